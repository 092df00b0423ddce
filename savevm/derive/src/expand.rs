//! The implementation of `VmState`, and of `Element` and `Field` so that the struct can be a field of another.

use crate::attributes::{Declaration, Field, Release, Subsection, Version};
use crate::walk;
use proc_macro2::{Ident, TokenStream, TokenTree};
use quote::{ToTokens, quote, quote_spanned};
use syn::GenericParam;
use syn::spanned::Spanned;

pub(crate) fn implementation(declaration: &Declaration) -> TokenStream {
    let ident = &declaration.ident;
    let (impl_generics, type_generics, where_clause) = declaration.generics.split_for_impl();
    let generic_parameters = &declaration.generics.params;
    let name = &declaration.name;
    let (version, minimum_version) = (&declaration.version, &declaration.minimum_version);
    let compressible = compressible(declaration);
    let wire_version = predicate(&declaration.wire_version, quote!(u32), quote!(Self::VERSION));
    let needed = predicate(&declaration.needed, quote!(bool), quote!(true));
    let save_fields = walk::save_fields(declaration);
    let load_fields = walk::load_fields(declaration);
    let prepare = prepare(declaration);
    let accept = accept(declaration);
    let description = description(declaration);
    let names = subsection_names(declaration);
    let versions = versions(declaration);
    let code = quote! {
        #[automatically_derived]
        #[allow(unused_variables, clippy::all)]
        impl #impl_generics __qevm::vmstate::VmState for #ident #type_generics #where_clause {
            const NAME: &'static str = #name;
            const VERSION: u32 = #version;
            const MINIMUM_VERSION: u32 = #minimum_version;
            const COMPRESSIBLE: bool = #compressible;
            fn wire_version(&self, ctx: &__qevm::vmstate::Context) -> u32 {
                #wire_version
            }
            fn needed(&self, ctx: &__qevm::vmstate::Context) -> bool {
                #needed
            }
            #save_fields
            #load_fields
            #prepare
            #accept
            #description
        }

        #[automatically_derived]
        impl #impl_generics __qevm::vmstate::Element for #ident #type_generics #where_clause {
            const TYPE: &'static str = "struct";
            const COMPRESSIBLE: bool = <Self as __qevm::vmstate::VmState>::COMPRESSIBLE;
            fn put(
                &self,
                out: &mut __qevm::vmstate::Saver<'_>,
            ) -> ::core::result::Result<(), __qevm::Error> {
                out.object(self, #version)
            }
            fn take(
                input: &mut __qevm::vmstate::Loader<'_, '_, '_>,
            ) -> ::core::result::Result<Self, __qevm::Error> {
                input.object(#version)
            }
            fn describe(
                ctx: &__qevm::vmstate::Context,
            ) -> __qevm::vmstate::ElementDescription {
                __qevm::vmstate::ElementDescription {
                    type_name: ::core::option::Option::Some("struct".into()),
                    layout: __qevm::vmstate::Layout::Struct(
                        <Self as __qevm::vmstate::VmState>::description(ctx),
                    ),
                }
            }
            fn prepare(
                &mut self,
                ctx: &__qevm::vmstate::Context,
            ) -> ::core::result::Result<(), __qevm::vmstate::VmStateError> {
                <Self as __qevm::vmstate::VmState>::prepare(self, ctx)
            }
            fn accept(
                &mut self,
                ctx: &__qevm::vmstate::Context,
            ) -> ::core::result::Result<(), __qevm::vmstate::VmStateError> {
                <Self as __qevm::vmstate::VmState>::accept(self, #version, ctx)
            }
        }
        __qevm::element_is_field!([#generic_parameters] #ident #type_generics);
        #names
        #versions
    };
    let krate = declaration.krate.as_ref().map_or_else(|| quote!(::qevm_savevm), ToTokens::to_token_stream);
    // A scope of its own for the name by which the code calls the crate.
    quote! {
        const _: () = {
            use #krate as __qevm;
            #code
        };
    }
}

/// Refuses, when the crate is compiled, subsections that no loader would find: a name that does not start with the
/// VMSD's, and one name twice.
fn subsection_names(declaration: &Declaration) -> TokenStream {
    let name = &declaration.name;
    // What depends on a parameter has no name yet.
    let known: Vec<_> = declaration.subsections.iter().map(|subsection| &subsection.ty).collect();
    let known: Vec<_> = known.into_iter().filter(|ty| !names_a_parameter(ty.to_token_stream(), declaration)).collect();
    let checks = known.iter().enumerate().map(|(place, ty)| {
        let own = quote!(<#ty as __qevm::vmstate::VmState>::NAME);
        let twice = known[..place].iter().map(|earlier| {
            quote_spanned! {ty.span()=>
                assert!(
                    !__qevm::vmstate::__same_name(<#earlier as __qevm::vmstate::VmState>::NAME, #own),
                    "two subsections have the same name",
                );
            }
        });
        quote_spanned! {ty.span()=>
            assert!(
                __qevm::vmstate::__names_subsection(#name, #own),
                "the name of a subsection starts with that of its VMSD, and is longer: QEMU takes others for the next section",
            );
            #(#twice)*
        }
    });
    quote!(#(const _: () = { #checks };)*)
}

/// Refuses, when the crate is compiled, constants that are out of order.
fn versions(declaration: &Declaration) -> TokenStream {
    let version = &declaration.version;
    let check = |lower: &Version, why: &str| {
        let known = lower.is_compared_with(version);
        (!known)
            .then(|| quote_spanned!(lower.to_token_stream().span()=> const _: () = assert!(#lower <= #version, #why);))
    };
    let minimum = check(&declaration.minimum_version, "minimum_version is above version");
    let since = declaration.fields.iter().filter_map(|field| {
        check(field.since.as_ref()?, "since is above the VMSD's version: the field would never be written")
    });
    quote!(#minimum #(#since)*)
}

/// A type is, or contains, one of the declaration's parameters.
fn names_a_parameter(ty: TokenStream, declaration: &Declaration) -> bool {
    let is_parameter = |ident: &Ident| {
        declaration.generics.params.iter().any(|parameter| match parameter {
            GenericParam::Type(parameter) => parameter.ident == *ident,
            GenericParam::Const(parameter) => parameter.ident == *ident,
            GenericParam::Lifetime(_) => false,
        })
    };
    ty.into_iter().any(|token| match token {
        TokenTree::Group(group) => names_a_parameter(group.stream(), declaration),
        TokenTree::Ident(ident) => is_parameter(&ident),
        _ => false,
    })
}

/// The trait through which a field is saved and loaded.
pub(crate) fn field_trait(field: &Field) -> TokenStream {
    match field.len {
        Some(_) => quote!(__qevm::vmstate::VarField),
        None => quote!(__qevm::vmstate::Field),
    }
}

/// The constant with what the declaration says of a field.
pub(crate) fn field_info(field: &Field) -> TokenStream {
    let (name, json_name) = (&field.name, &field.json_name);
    let type_name = field.type_name.iter().map(|t| quote!(.type_name(#t)));
    let since = field.since.iter().map(|since| quote!(.since(#since)));
    let conditional = field.exists.iter().map(|_| quote!(.conditional()));
    quote! {
        const __INFO: __qevm::vmstate::FieldInfo =
            __qevm::vmstate::FieldInfo::new(#name, #json_name) #(#type_name)* #(#since)* #(#conditional)*;
    }
}

fn compressible(declaration: &Declaration) -> TokenStream {
    if !declaration.subsections.is_empty() || declaration.fields.iter().any(|f| f.exists.is_some()) {
        return quote!(false);
    }
    let parts = declaration.fields.iter().map(|field| {
        let (ty, field_trait) = (&field.ty, field_trait(field));
        quote!(&& <#ty as #field_trait>::COMPRESSIBLE)
    });
    quote!(true #(#parts)*)
}

/// A call of a predicate over the value and the context, or its default.
fn predicate(expression: &Option<impl ToTokens>, result: TokenStream, default: TokenStream) -> TokenStream {
    let Some(expression) = expression else { return default };
    quote! {
        let __predicate: fn(&Self, &__qevm::vmstate::Context) -> #result = #expression;
        __predicate(self, ctx)
    }
}

fn prepare(declaration: &Declaration) -> TokenStream {
    let hook = declaration.pre_save.iter().map(|hook| quote!(#hook(self, ctx)?;));
    let fields = declaration.fields.iter().map(|field| {
        let (field_trait, value) = (field_trait(field), &field.ident);
        match field.condition() {
            Some(_) => quote!(if let Some(value) = &mut self.#value { #field_trait::prepare(value, ctx)?; }),
            None => quote!(#field_trait::prepare(&mut self.#value, ctx)?;),
        }
    });
    let subsections = declaration.subsections.iter().map(prepare_subsection);
    quote! {
        fn prepare(
            &mut self,
            ctx: &__qevm::vmstate::Context,
        ) -> ::core::result::Result<(), __qevm::vmstate::VmStateError> {
            #(#hook)*
            #(#fields)*
            #(#subsections)*
            Ok(())
        }
    }
}

fn prepare_subsection(subsection: &Subsection) -> TokenStream {
    let (ident, ty) = (&subsection.ident, &subsection.ty);
    let needed_by_parent = match &subsection.needed {
        Some(_) => {
            let call = predicate(&subsection.needed, quote!(bool), quote!(true));
            quote!(&& { #call })
        }
        None => quote!(),
    };
    let outside = |bound: &Option<Release>, operator: TokenStream, exists: &str| {
        bound.map(|(major, minor)| {
            let exists = format!("{exists} {major}.{minor}");
            quote! {
                if ctx.profile.qemu #operator __qevm::vmstate::QemuVersion::new(#major, #minor) {
                    return Err(__qevm::vmstate::VmStateError::NotInRelease {
                        name: <#ty as __qevm::vmstate::VmState>::NAME,
                        release: ctx.profile.qemu,
                        exists: #exists,
                    });
                }
            }
        })
    };
    let too_old = outside(&subsection.since_release, quote!(<), "since");
    let too_new = outside(&subsection.until_release, quote!(>), "until");
    quote! {
        let __needed = self
            .#ident
            .as_ref()
            .is_some_and(|content| <#ty as __qevm::vmstate::VmState>::needed(content, ctx))
            #needed_by_parent;
        match &mut self.#ident {
            Some(content) if __needed => {
                #too_old
                #too_new
                <#ty as __qevm::vmstate::VmState>::prepare(content, ctx)?;
            }
            absent => *absent = None,
        }
    }
}

fn accept(declaration: &Declaration) -> TokenStream {
    let fields = declaration.fields.iter().map(|field| {
        let (field_trait, value) = (field_trait(field), &field.ident);
        match field.condition() {
            Some(_) => quote!(if let Some(value) = &mut self.#value { #field_trait::accept(value, ctx)?; }),
            None => quote!(#field_trait::accept(&mut self.#value, ctx)?;),
        }
    });
    let subsections = declaration.subsections.iter().map(|subsection| {
        let (ident, ty) = (&subsection.ident, &subsection.ty);
        quote! {
            if let Some(content) = &mut self.#ident {
                let version = <#ty as __qevm::vmstate::VmState>::wire_version(content, ctx);
                <#ty as __qevm::vmstate::VmState>::accept(content, version, ctx)?;
            }
        }
    });
    let hook = declaration.post_load.iter().map(|hook| quote!(#hook(self, version, ctx)?;));
    quote! {
        fn accept(
            &mut self,
            version: u32,
            ctx: &__qevm::vmstate::Context,
        ) -> ::core::result::Result<(), __qevm::vmstate::VmStateError> {
            #(#fields)*
            #(#subsections)*
            #(#hook)*
            Ok(())
        }
    }
}

fn description(declaration: &Declaration) -> TokenStream {
    let fields = declaration.fields.iter().map(|field| {
        let (ty, field_trait, info) = (&field.ty, field_trait(field), field_info(field));
        let released = field.released.iter().map(|released| quote!(&& (#released)));
        let since = field.since.as_ref().map_or_else(|| quote!(0), ToTokens::to_token_stream);
        quote! {
            if #since <= version #(#released)* {
                #info
                __fields.push(<#ty as #field_trait>::describe(&__INFO, ctx));
            }
        }
    });
    let versions = match &declaration.release_versions {
        Some(versions) => quote! {
            let __versions: fn(&__qevm::vmstate::Context) -> (u32, u32) = #versions;
            let (version, minimum_version) = __versions(ctx);
        },
        None => quote!(let (version, minimum_version) = (Self::VERSION, Self::MINIMUM_VERSION);),
    };
    let subsections = declaration.subsections.iter().map(|subsection| {
        let ty = &subsection.ty;
        let release = |bound: &Option<Release>, operator| {
            bound.map(|(major, minor)| {
                quote!(&& ctx.profile.qemu #operator __qevm::vmstate::QemuVersion::new(#major, #minor))
            })
        };
        let since = release(&subsection.since_release, quote!(>=));
        let until = release(&subsection.until_release, quote!(<=));
        quote! {
            if true #since #until {
                __subsections.push(<#ty as __qevm::vmstate::VmState>::description(ctx));
            }
        }
    });
    quote! {
        fn description(ctx: &__qevm::vmstate::Context) -> __qevm::vmstate::Description {
            #versions
            #[allow(unused_mut)]
            let mut __fields = ::std::vec::Vec::new();
            #(#fields)*
            #[allow(unused_mut)]
            let mut __subsections = ::std::vec::Vec::new();
            #(#subsections)*
            __qevm::vmstate::Description {
                name: Self::NAME.into(),
                version,
                minimum_version,
                fields: __fields,
                subsections: __subsections,
            }
        }
    }
}
