//! Wrong declarations are refused where they are wrong, with what to do instead.

use crate::attributes::Declaration;
use quote::quote;

fn refusal(tokens: proc_macro2::TokenStream) -> String {
    let input = syn::parse2(tokens).unwrap();
    match Declaration::parse(&input) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn refuses(tokens: proc_macro2::TokenStream, reason: &str) {
    let message = refusal(tokens);
    assert!(message.contains(reason), "{message:?} does not say {reason:?}");
}

#[test]
fn only_structs_with_named_fields_are_vmsds() {
    refuses(
        quote!(
            enum E {
                A,
            }
        ),
        "describes a struct",
    );
    refuses(
        quote!(
            struct S(u8);
        ),
        "named fields",
    );
}

#[test]
fn a_vmsd_has_a_name_and_consistent_versions() {
    refuses(
        quote!(
            #[vmstate(version = 1)]
            struct S {}
        ),
        "missing #[vmstate(name",
    );
    refuses(
        quote!(
            #[vmstate(name = "x")]
            struct S {}
        ),
        "missing #[vmstate(version",
    );
    refuses(
        quote!(
            #[vmstate(name = "", version = 1)]
            struct S {}
        ),
        "1 to 255 bytes",
    );
    refuses(
        quote!(
            #[vmstate(name = "x", version = 1, minimum_version = 2)]
            struct S {}
        ),
        "above version",
    );
    refuses(
        quote!(
            #[vmstate(name = "x", version = Self::NEWEST)]
            struct S {}
        ),
        "name the type",
    );
    refuses(
        quote!(
            #[vmstate(name = "x", version = OLDEST + 1)]
            struct S {}
        ),
        "a number or the name of a constant",
    );
    refuses(
        quote!(
            #[vmstate(name = "x", version = 1, version = 2)]
            struct S {}
        ),
        "given twice",
    );
    refuses(
        quote!(
            #[vmstate(name = "x", size = 1)]
            struct S {}
        ),
        "unknown attribute `size`",
    );
}

#[test]
fn fields_take_field_attributes() {
    let with = |field| quote!(#[vmstate(name = "x", version = 2)] struct S { #field });
    refuses(with(quote!(#[vmstate(lenght = 3)] a: Vec<u8>)), "unknown attribute `lenght`");
    refuses(with(quote!(#[vmstate(since = 3)] a: u8)), "never be written");
    refuses(with(quote!(#[vmstate(exists = true)] a: u8)), "is an Option");
    refuses(with(quote!(#[vmstate(exists = true, released = true)] a: Option<u8>)), "`released` is for fields");
    refuses(with(quote!(#[vmstate(needed = |_, _| true)] a: u8)), "belong to a subsection");
    refuses(with(quote!(ctx: u8)), "name the field differently");
    refuses(with(quote!(a: Vec<u8>)), "#[vmstate(len = …)]");
    refuses(with(quote!(a: std::vec::Vec<u8>)), "its length is not on the wire");
    refuses(with(quote!(a: VarBuffer)), "its length is not on the wire");
    refuses(with(quote!(a: Option<u8>)), "#[vmstate(exists = …)]");
}

#[test]
fn subsections_take_subsection_attributes_and_come_last() {
    let with = |fields| quote!(#[vmstate(name = "x", version = 1)] struct S { #fields });
    refuses(with(quote!(#[vmstate(subsection)] a: Sub)), "a subsection is an Option");
    refuses(with(quote!(#[vmstate(subsection, since = 1)] a: Option<Sub>)), "takes only");
    refuses(with(quote!(#[vmstate(subsection, since_release = "ten")] a: Option<Sub>)), "not a QEMU release");
    refuses(with(quote!(#[vmstate(subsection)] a: Option<Sub>, b: u8)), "fields come before subsections");
}

#[test]
fn repeated_names_are_numbered_and_raw_names_are_plain() {
    let input = syn::parse2(quote! {
        #[vmstate(name = "x", version = 1)]
        struct S { #[vmstate(name = "a")] b: u8, a: u8, r#type: u8 }
    });
    let declaration = Declaration::parse(&input.unwrap()).unwrap_or_else(|error| panic!("{error}"));
    let names: Vec<_> = declaration.fields.iter().map(|field| field.json_name.as_str()).collect();
    assert_eq!(names, ["a[0]", "a[1]", "type"]);
}

#[test]
fn the_crate_is_where_the_declaration_says() {
    let input = syn::parse2(quote! {
        #[vmstate(name = "x", version = 1, crate = vmm::savevm)]
        struct S { a: u8, #[vmstate(subsection)] b: Option<Sub> }
    });
    let declaration = Declaration::parse(&input.unwrap()).unwrap_or_else(|error| panic!("{error}"));
    let code = crate::expand::implementation(&declaration).to_string();
    assert!(code.contains("use vmm :: savevm as __qevm ;"), "{code}");
    assert!(!code.contains("qevm_savevm"), "{code}");
}

#[test]
fn names_of_subsections_are_checked_where_they_are_known() {
    let input = syn::parse2(quote! {
        #[vmstate(name = "x", version = 1)]
        struct S<T, const N: usize> {
            #[vmstate(subsection)] a: Option<Known>,
            #[vmstate(subsection)] b: Option<Of<T>>,
            #[vmstate(subsection)] c: Option<[u8; N]>,
            #[vmstate(subsection)] d: Option<Other>,
        }
    });
    let declaration = Declaration::parse(&input.unwrap()).unwrap_or_else(|error| panic!("{error}"));
    let code = crate::expand::implementation(&declaration).to_string();
    let checked = |ty: &str| {
        code.contains(&format!("__names_subsection (\"x\" , < {ty} as __qevm :: vmstate :: VmState > :: NAME)"))
    };
    assert!(checked("Known") && checked("Other"), "{code}");
    assert!(!checked("Of < T >") && !checked("[u8 ; N]"), "{code}");
    assert_eq!(code.matches("__same_name").count(), 1, "{code}");
}
