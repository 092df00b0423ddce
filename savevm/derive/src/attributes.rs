//! From `#[vmstate(…)]` attributes to a declaration that makes sense.

use proc_macro2::TokenStream;
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned;
use syn::{
    Attribute, Data, DeriveInput, Error, Expr, ExprLit, Fields, GenericArgument, Generics, Ident, Lit, LitStr, Path,
    PathArguments, Result, Type,
};

/// A struct with its attributes.
pub(crate) struct Declaration {
    pub(crate) ident: Ident,
    pub(crate) generics: Generics,
    /// Where the code finds `qevm-savevm`, if not in the crate root.
    pub(crate) krate: Option<Path>,
    pub(crate) name: LitStr,
    pub(crate) version: Version,
    pub(crate) minimum_version: Version,
    pub(crate) needed: Option<Expr>,
    pub(crate) wire_version: Option<Expr>,
    pub(crate) release_versions: Option<Expr>,
    pub(crate) pre_save: Option<Path>,
    pub(crate) post_load: Option<Path>,
    pub(crate) fields: Vec<Field>,
    pub(crate) subsections: Vec<Subsection>,
}

/// A field on the wire.
pub(crate) struct Field {
    pub(crate) ident: Ident,
    /// The field's type, without the `Option` of a conditional one.
    pub(crate) ty: Type,
    pub(crate) name: String,
    /// The name with QEMU's `[k]` if it occurs several times.
    pub(crate) json_name: String,
    pub(crate) type_name: Option<LitStr>,
    pub(crate) since: Option<Version>,
    pub(crate) exists: Option<Expr>,
    /// Like `exists`, from the context alone.
    pub(crate) released: Option<Expr>,
    pub(crate) len: Option<Expr>,
    pub(crate) null: Option<Expr>,
    /// The context that the field's own content sees.
    pub(crate) context: Option<Expr>,
}

/// A subsection.
pub(crate) struct Subsection {
    pub(crate) ident: Ident,
    /// The type inside the `Option`.
    pub(crate) ty: Type,
    pub(crate) needed: Option<Expr>,
    pub(crate) since_release: Option<Release>,
    pub(crate) until_release: Option<Release>,
}

/// A version: a number, or a constant that is one.
#[derive(Clone)]
pub(crate) struct Version {
    expr: Expr,
    /// Of a constant only the compiler knows it.
    number: Option<u32>,
}

impl Version {
    /// It is certain already that this one is above the other.
    fn is_above(&self, other: &Version) -> bool {
        self.number > other.number && other.number.is_some()
    }

    /// Whether both are numbers, which are compared here.
    pub(crate) fn is_compared_with(&self, other: &Version) -> bool {
        self.number.is_some() && other.number.is_some()
    }
}

impl ToTokens for Version {
    fn to_tokens(&self, tokens: &mut TokenStream) {
        self.expr.to_tokens(tokens);
    }
}

/// A QEMU release, major and minor.
pub(crate) type Release = (u16, u16);

/// Names that generated code gives to values of its own, in scope of the attributes' expressions.
const RESERVED: [&str; 3] = ["version", "ctx", "index"];

impl Field {
    /// The condition under which the field exists.
    pub(crate) fn condition(&self) -> Option<&Expr> {
        self.exists.as_ref().or(self.released.as_ref())
    }
}

impl Declaration {
    pub(crate) fn parse(input: &DeriveInput) -> Result<Declaration> {
        let Data::Struct(data) = &input.data else {
            return Err(Error::new(input.ident.span(), "VmState describes a struct: enums and unions have no VMSD"));
        };
        let Fields::Named(named) = &data.fields else {
            return Err(Error::new(input.ident.span(), "VmState needs named fields, they are QEMU's field names"));
        };
        let (mut name, mut krate) = (None, None);
        let (mut version, mut minimum_version) = (None, None);
        let (mut needed, mut wire_version, mut release_versions) = (None, None, None);
        let (mut pre_save, mut post_load) = (None, None);
        each_attribute(&input.attrs, |meta| match key(meta)?.as_str() {
            "name" => set(&mut name, meta, |m| m.value()?.parse()),
            "crate" => set(&mut krate, meta, |m| m.value()?.parse()),
            "version" => set(&mut version, meta, a_version),
            "minimum_version" => set(&mut minimum_version, meta, a_version),
            "needed" => set(&mut needed, meta, |m| m.value()?.parse()),
            "wire_version" => set(&mut wire_version, meta, |m| m.value()?.parse()),
            "release_versions" => set(&mut release_versions, meta, |m| m.value()?.parse()),
            "pre_save" => set(&mut pre_save, meta, |m| m.value()?.parse()),
            "post_load" => set(&mut post_load, meta, |m| m.value()?.parse()),
            other => Err(meta.error(format!(
                "unknown attribute `{other}` of a VMSD: expected name, version, minimum_version, needed, wire_version, \
                 release_versions, pre_save, post_load or crate"
            ))),
        })?;
        let missing = |what| Error::new(input.ident.span(), format!("missing #[vmstate({what})]"));
        let name: LitStr = name.ok_or_else(|| missing("name = \"…\""))?;
        if name.value().is_empty() || name.value().len() > 255 {
            return Err(Error::new(name.span(), "a VMSD's name has 1 to 255 bytes"));
        }
        let version = version.ok_or_else(|| missing("version = …"))?;
        let minimum_version = minimum_version.unwrap_or_else(|| version.clone());
        if minimum_version.is_above(&version) {
            return Err(Error::new(input.ident.span(), "minimum_version is above version"));
        }
        let (mut fields, mut subsections) = (Vec::new(), Vec::new());
        for field in &named.named {
            match parse_field(field, &version)? {
                Member::Field(_) if !subsections.is_empty() => {
                    return Err(Error::new(field.span(), "fields come before subsections on the wire: move this up"));
                }
                Member::Field(field) => fields.push(*field),
                Member::Subsection(subsection) => subsections.push(*subsection),
            }
        }
        number_repeated_names(&mut fields);
        Ok(Declaration {
            ident: input.ident.clone(),
            generics: input.generics.clone(),
            krate,
            name,
            version,
            minimum_version,
            needed,
            wire_version,
            release_versions,
            pre_save,
            post_load,
            fields,
            subsections,
        })
    }
}

enum Member {
    Field(Box<Field>),
    Subsection(Box<Subsection>),
}

fn parse_field(field: &syn::Field, version: &Version) -> Result<Member> {
    let ident = field.ident.clone().ok_or_else(|| Error::new(field.span(), "a field needs a name"))?;
    let plain = ident.unraw().to_string();
    if RESERVED.contains(&plain.as_str()) {
        return Err(Error::new(
            ident.span(),
            format!(
                "`{plain}` is what the attributes' expressions call something \
             else: name the field differently and give QEMU's name with #[vmstate(name = \"{plain}\")]"
            ),
        ));
    }
    let (mut name, mut type_name, mut since) = (None, None, None);
    let (mut exists, mut len, mut null, mut context, mut needed) = (None, None, None, None, None);
    let mut released = None;
    let (mut subsection, mut since_release, mut until_release) = (None, None, None);
    each_attribute(&field.attrs, |meta| {
        match key(meta)?.as_str() {
        "name" => set(&mut name, meta, |m| m.value()?.parse::<LitStr>()),
        "type" => set(&mut type_name, meta, |m| m.value()?.parse::<LitStr>()),
        "since" => set(&mut since, meta, a_version),
        "exists" => set(&mut exists, meta, |m| m.value()?.parse::<Expr>()),
        "released" => set(&mut released, meta, |m| m.value()?.parse::<Expr>()),
        "len" => set(&mut len, meta, |m| m.value()?.parse::<Expr>()),
        "null" => set(&mut null, meta, |m| m.value()?.parse::<Expr>()),
        "context" => set(&mut context, meta, |m| m.value()?.parse::<Expr>()),
        "needed" => set(&mut needed, meta, |m| m.value()?.parse::<Expr>()),
        "subsection" => set(&mut subsection, meta, |_| Ok(())),
        "since_release" => set(&mut since_release, meta, release),
        "until_release" => set(&mut until_release, meta, release),
        other => Err(meta.error(format!(
            "unknown attribute `{other}` of a field: expected name, type, since, exists, released, len, null, context, subsection, \
             needed, since_release or until_release"
        ))),
    }
    })?;
    let error = |message: &str| Err(Error::new(field.span(), message));
    if subsection.is_some() {
        if name.is_some()
            || type_name.is_some()
            || since.is_some()
            || exists.is_some()
            || released.is_some()
            || len.is_some()
            || null.is_some()
            || context.is_some()
        {
            return error("a subsection takes only needed, since_release and until_release");
        }
        let ty = option_inner(&field.ty, "a subsection is an Option: None if it is not on the wire")?;
        return Ok(Member::Subsection(Box::new(Subsection { ident, ty, needed, since_release, until_release })));
    }
    if needed.is_some() || since_release.is_some() || until_release.is_some() {
        return error(
            "needed, since_release and until_release belong to a subsection; a field has `exists` and `since`",
        );
    }
    if since.as_ref().is_some_and(|since| since.is_above(version)) {
        return error("since is above the VMSD's version: the field would never be written");
    }
    if exists.is_some() && released.is_some() {
        return error(
            "`released` is for fields that exist in some releases only; with a further condition use `exists`",
        );
    }
    if len.is_none() && is_a(&field.ty, &["Vec", "VarBuffer", "Bitmap"]) {
        return error(
            "its length is not on the wire: say which field or constant gives it with #[vmstate(len = …)]; an array `[T; N]` \
             has its own",
        );
    }
    if exists.is_none() && released.is_none() && is_a(&field.ty, &["Option"]) {
        return error(
            "nothing on the wire tells whether it is there: say when it is with #[vmstate(exists = …)] or `released`, or make it \
             a `subsection`",
        );
    }
    let ty = match (&exists, &released) {
        (None, None) => field.ty.clone(),
        _ => option_inner(&field.ty, "a field that may not exist is an Option")?,
    };
    let name = name.map_or(plain, |name: LitStr| name.value());
    let json_name = name.clone();
    Ok(Member::Field(Box::new(Field {
        ident,
        ty,
        name,
        json_name,
        type_name,
        since,
        exists,
        released,
        len,
        null,
        context,
    })))
}

/// QEMU appends `[k]` to names that several fields of a VMSD have; k counts all of them, written or not.
fn number_repeated_names(fields: &mut [Field]) {
    for i in 0..fields.len() {
        let same = |range: &[Field]| range.iter().filter(|f| f.name == fields[i].name).count();
        let (total, before) = (same(fields), same(&fields[..i]));
        if total > 1 {
            fields[i].json_name = format!("{}[{before}]", fields[i].name);
        }
    }
}

fn option_inner(ty: &Type, why: &str) -> Result<Type> {
    if let Type::Path(path) = ty
        && let Some(last) = path.path.segments.last()
        && last.ident == "Option"
        && let PathArguments::AngleBracketed(arguments) = &last.arguments
        && let Some(GenericArgument::Type(inner)) = arguments.args.first()
    {
        return Ok(inner.clone());
    }
    Err(Error::new(ty.span(), why))
}

/// The type is called one of these.
fn is_a(ty: &Type, names: &[&str]) -> bool {
    matches!(ty, Type::Path(path) if path.path.segments.last().is_some_and(|last| names.iter().any(|name| last.ident == name)))
}

fn each_attribute(attrs: &[Attribute], mut visit: impl FnMut(&ParseNestedMeta<'_>) -> Result<()>) -> Result<()> {
    attrs
        .iter()
        .filter(|attr| attr.path().is_ident("vmstate"))
        .try_for_each(|attr| attr.parse_nested_meta(|meta| visit(&meta)))
}

fn key(meta: &ParseNestedMeta<'_>) -> Result<String> {
    meta.path.get_ident().map(|ident| ident.unraw().to_string()).ok_or_else(|| meta.error("expected a plain name"))
}

fn set<T>(
    slot: &mut Option<T>,
    meta: &ParseNestedMeta<'_>,
    parse: impl FnOnce(&ParseNestedMeta<'_>) -> Result<T>,
) -> Result<()> {
    if slot.is_some() {
        return Err(meta.error("given twice"));
    }
    *slot = Some(parse(meta)?);
    Ok(())
}

fn a_version(meta: &ParseNestedMeta<'_>) -> Result<Version> {
    let expr: Expr = meta.value()?.parse()?;
    let number = match &expr {
        Expr::Lit(ExprLit { lit: Lit::Int(number), .. }) => Some(number.base10_parse()?),
        Expr::Path(path) if path.path.segments.first().is_some_and(|first| first.ident == "Self") => {
            return Err(Error::new(expr.span(), "there is no `Self` here: name the type"));
        }
        Expr::Path(_) => None,
        _ => return Err(Error::new(expr.span(), "a version is a number or the name of a constant")),
    };
    Ok(Version { expr, number })
}

fn release(meta: &ParseNestedMeta<'_>) -> Result<Release> {
    let text: LitStr = meta.value()?.parse()?;
    let parsed =
        text.value().split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parsed.ok_or_else(|| Error::new(text.span(), "not a QEMU release such as \"10.0\""))
}
