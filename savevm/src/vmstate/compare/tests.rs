//! Each kind of difference.

use super::*;
use crate::vmstate::ElementDescription;

#[test]
fn every_difference_is_told_with_both_values() {
    let field = |name: &str, type_name: &str, size, count| FieldDescription {
        name: name.into(),
        since: 0,
        conditional: false,
        count,
        element: ElementDescription { type_name: Some(type_name.into()), layout: Layout::Bytes(size) },
    };
    let base = Description {
        name: "toy".into(),
        version: 2,
        minimum_version: 2,
        fields: vec![field("a", "uint32", 4, Count::One), field("b", "uint8", 1, Count::Fixed(4))],
        subsections: vec![],
    };
    let against = |change: &dyn Fn(&mut Description)| {
        let mut source = base.clone();
        change(&mut source);
        let findings = compare(&source, Source::Stream, std::slice::from_ref(&base));
        findings.into_iter().map(|f| (f.path, f.difference, f.severity)).collect::<Vec<_>>()
    };
    let toy = |difference, severity| vec![("toy".to_owned(), difference, severity)];
    assert_eq!(against(&|_| {}), []);
    let newer = Difference::VersionTooNew { source: 3, destination: 2 };
    assert_eq!(against(&|s| s.version = 3), toy(newer, Severity::Fails));
    let older = Difference::VersionTooOld { source: 1, minimum: 2 };
    assert_eq!(against(&|s| s.version = 1), toy(older, Severity::Fails));
    let missing = Difference::FieldMissing { field: "a".into() };
    assert_eq!(against(&|s| drop(s.fields.remove(0))), toy(missing, Severity::Fails));
    let unknown = Difference::FieldUnknown { field: "c".into() };
    assert_eq!(against(&|s| s.fields.push(field("c", "bool", 1, Count::One))), toy(unknown, Severity::Fails));
    let size = Difference::Size { source: 8, destination: 4 };
    let at_a = |difference, severity| vec![("toy › a".to_owned(), difference, severity)];
    assert_eq!(against(&|s| s.fields[0] = field("a", "uint64", 8, Count::One)), at_a(size, Severity::Fails));
    let types = Difference::Type { source: "int32".into(), destination: "uint32".into() };
    assert_eq!(against(&|s| s.fields[0] = field("a", "int32", 4, Count::One)), at_a(types, Severity::Suspicious));
    let length = Difference::Length { source: 5, destination: 4 };
    assert_eq!(
        against(&|s| s.fields[1].count = Count::Fixed(5)),
        vec![("toy › b".to_owned(), length, Severity::Fails)]
    );
    let section = Difference::SectionUnknown { name: "other".into() };
    assert_eq!(against(&|s| s.name = "other".into()), vec![("other".to_owned(), section, Severity::Fails)]);
}
