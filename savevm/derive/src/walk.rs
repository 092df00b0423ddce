//! The two walks along the wire: saving and loading the fields, then the subsections.

use crate::attributes::{Declaration, Field};
use crate::expand::{field_info, field_trait};
use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote};

pub(crate) fn save_fields(declaration: &Declaration) -> TokenStream {
    let idents = declaration.fields.iter().map(|field| &field.ident);
    let fields = declaration.fields.iter().map(save_field);
    let subsections = declaration.subsections.iter().map(|subsection| {
        let ident = &subsection.ident;
        quote!(__out.subsection(self.#ident.as_ref())?;)
    });
    quote! {
        fn save_fields(
            &self,
            __out: &mut __qevm::vmstate::Saver<'_>,
            version: u32,
        ) -> ::core::result::Result<(), __qevm::Error> {
            let ctx = __out.context();
            let Self { #(#idents,)* .. } = self;
            #(#fields)*
            #(#subsections)*
            Ok(())
        }
    }
}

fn save_field(field: &Field) -> TokenStream {
    let (ident, name) = (&field.ident, &field.name);
    let (info, field_trait, path) = (field_info(field), field_trait(field), field_path(field));
    let len = field.len.iter().map(|len| quote!(, (#len) as u64));
    let save = quote!(#field_trait::save(__value, __out, &__INFO #(#len)*));
    let save = in_context(field, quote!(__out), save);
    let save = quote!(__qevm::vmstate::Within::within(#save, || #path)?;);
    let conditional = match (field.condition(), &field.since) {
        (Some(exists), _) => quote! {
            match (#exists, #ident) {
                (true, ::core::option::Option::Some(__value)) => { #save }
                (false, ::core::option::Option::None) => {}
                (true, _) => return Err(__out.fail(__qevm::vmstate::VmStateError::FieldMissing { field: #name })),
                (false, _) => {
                    return Err(__out.fail(__qevm::vmstate::VmStateError::FieldInExcess { field: #name }));
                }
            }
        },
        (None, Some(since)) => quote!(if version >= #since { let __value = #ident; #save }),
        (None, None) => quote!(let __value = #ident; #save),
    };
    quote!({
        #info
        #conditional
    })
}

pub(crate) fn load_fields(declaration: &Declaration) -> TokenStream {
    let fields = declaration.fields.iter().map(load_field);
    let slots = declaration.subsections.iter().map(|subsection| {
        let (slot, ty) = (value(&subsection.ident), &subsection.ty);
        quote!(let mut #slot: ::core::option::Option<#ty> = ::core::option::Option::None;)
    });
    let known = declaration.subsections.iter().enumerate().map(|(order, subsection)| {
        let (slot, ty) = (value(&subsection.ident), &subsection.ty);
        quote! {
            if __header.name == *<#ty as __qevm::vmstate::VmState>::NAME {
                __input.subsection(&mut #slot, &__header, #order, &mut __last)?;
                continue;
            }
        }
    });
    let members = declaration.fields.iter().map(|f| &f.ident).chain(declaration.subsections.iter().map(|s| &s.ident));
    let members = members.map(|ident| {
        let value = value(ident);
        quote!(#ident: #value)
    });
    quote! {
        fn load_fields(
            __input: &mut __qevm::vmstate::Loader<'_, '_, '_>,
            version: u32,
        ) -> ::core::result::Result<Self, __qevm::Error> {
            let ctx = __input.context();
            #(#fields)*
            #(#slots)*
            #[allow(unused_mut)]
            let mut __last = 0usize;
            while let ::core::option::Option::Some(__header) = __input.next_subsection(Self::NAME)? {
                #(#known)*
                return Err(__input.unknown_subsection(Self::NAME, __header));
            }
            Ok(Self { #(#members),* })
        }
    }
}

fn load_field(field: &Field) -> TokenStream {
    let (ident, ty, path) = (&field.ident, &field.ty, field_path(field));
    let (value, field_trait) = (value(ident), field_trait(field));
    let len = field.len.iter().map(|len| quote!(, (#len) as u64));
    let read = match &field.null {
        Some(null) => {
            let len = field.len.as_ref().map_or(quote!(0), |len| quote!((#len) as u64));
            quote!(<#ty as __qevm::vmstate::PointerField>::load(__input, #len, &|index: usize| #null))
        }
        None => quote!(<#ty as #field_trait>::load(__input #(#len)*)),
    };
    let read = in_context(field, quote!(__input), read);
    let read = quote!(__qevm::vmstate::Within::within(#read, || #path)?);
    let (ty, read) = match (field.condition(), &field.since) {
        (Some(exists), _) => (
            quote!(::core::option::Option<#ty>),
            quote!(if #exists { ::core::option::Option::Some(#read) } else { ::core::option::Option::None }),
        ),
        (None, Some(since)) => {
            (quote!(#ty), quote!(if version >= #since { #read } else { ::core::default::Default::default() }))
        }
        (None, None) => (quote!(#ty), read),
    };
    quote! {
        let #value: #ty = #read;
        let #ident = &#value;
    }
}

/// `walk`, under the context that attribute `context` gives.
fn in_context(field: &Field, walker: TokenStream, walk: TokenStream) -> TokenStream {
    match &field.context {
        Some(context) => quote! {{
            let __context: __qevm::vmstate::Context = #context;
            #walker.with_context(&__context, |#walker| #walk)
        }},
        None => walk,
    }
}

fn field_path(field: &Field) -> String {
    format!("field {}", field.name)
}

/// The local variable that owns a field while the struct is not complete.
fn value(ident: &Ident) -> Ident {
    format_ident!("__value_{}", ident)
}
