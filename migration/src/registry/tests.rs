use super::*;
use crate::GuestError;
use qevm_savevm::vmstate::VmStateError;
use qevm_wire::{Blame, Fault};
use std::sync::Arc;

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "button", version = 2, minimum_version = 2, post_load = Button::check)]
struct Button {
    pressed: u32,
    colour: [u8; 3],
    #[vmstate(subsection)]
    lamp: Option<Lamp>,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "button/lamp", version = 1, needed = |lamp, _| lamp.lit)]
struct Lamp {
    lit: bool,
}

impl Button {
    fn check(&mut self, _: u32, _: &Context) -> Result<(), VmStateError> {
        match self.pressed {
            0..100 => Ok(()),
            found => Err(VmStateError::Refused { what: "pressed", found: found.into(), expected: "below 100" }),
        }
    }
}

fn button(pressed: u32) -> Button {
    Button { pressed, colour: [1, 2, 3], lamp: Some(Lamp { lit: pressed > 5 }) }
}

fn profile() -> Profile {
    Profile::new(QemuVersion::NEWEST, "microvm")
}

/// The sections of two buttons, pressed 3 and 7 times.
fn saved(running: bool) -> Vec<DeviceSection> {
    let (mut first, second) = (button(3), Arc::new(Mutex::new(button(7))));
    let mut source = Registry::new("microvm");
    source.add("button", 0, &mut first).unwrap();
    source.share("button", 1, second).unwrap();
    source.save(&profile(), running).unwrap().sections().to_vec()
}

fn kind(error: &GuestError) -> &RegistryError {
    error.downcast_ref().unwrap_or_else(|| panic!("{error}"))
}

#[test]
fn devices_arrive_by_name_and_instance_owned_or_shared() {
    for running in [true, false] {
        let sections = saved(running);
        let names: Vec<_> = sections.iter().map(|section| (section.idstr.to_string(), section.instance_id)).collect();
        assert_eq!(names, [("button".into(), 0), ("button".into(), 1), ("globalstate".into(), 0)]);
        // Four bytes of count, three of colour; the lamp that is not lit is not sent.
        assert_eq!((sections[0].version_id, &*sections[0].body), (2, &[0, 0, 0, 3, 1, 2, 3][..]));

        let (first, mut second) = (Mutex::new(Button::default()), Button::default());
        let mut destination = Registry::new("microvm");
        destination.add("button", 1, &mut second).unwrap();
        destination.share("button", 0, &first).unwrap();
        assert_eq!(destination.load(&sections).unwrap(), running);
        drop(destination);
        assert_eq!(first.into_inner().unwrap(), Button { lamp: None, ..button(3) });
        assert_eq!(second, button(7));
    }
}

#[test]
fn the_description_names_every_field_of_every_section() {
    let mut first = button(7);
    let mut source = Registry::new("microvm");
    source.add("button", 0, &mut first).unwrap();
    let saved = source.save(&profile(), true).unwrap();
    let description = saved.description();
    for part in [
        r#""name": "button", "instance_id": 0, "vmsd_name": "button", "version": 2"#,
        r#""name": "pressed", "type": "uint32", "size": 4"#,
        r#""vmsd_name": "button/lamp""#,
        r#""name": "globalstate""#,
        r#""configuration""#,
    ] {
        let text = |text: &str| text.replace([' ', '\n'], "");
        assert!(text(description).contains(&text(part)), "{part} in {description}");
    }
}

/// A device that stays because its migration failed is used on.
#[test]
fn saving_leaves_the_device_as_it_is() {
    let mut here = button(3);
    let mut source = Registry::new("microvm");
    source.add("button", 0, &mut here).unwrap();
    source.save(&profile(), true).unwrap();
    drop(source);
    assert_eq!(here, button(3));
}

#[test]
fn an_unknown_section_is_refused_unless_it_is_ignored() {
    let mut first = Button::default();
    let mut destination = Registry::new("microvm");
    destination.add("button", 0, &mut first).unwrap();
    let (known, other) = (CountedString::new("button").unwrap(), CountedString::new("bell").unwrap());
    assert!(destination.has(&known, 0) && !destination.has(&known, 1) && !destination.has(&other, 0));
    assert!(destination.has(&CountedString::new("globalstate").unwrap(), 0));
    let error = destination.load(&saved(true)).unwrap_err();
    assert!(matches!(kind(&error), RegistryError::Unknown { idstr, instance_id: 1 } if *idstr == *"button"), "{error}");

    destination.ignore("bell").unwrap();
    assert!(destination.has(&other, 0) && destination.has(&other, 9));
    let mut sections = saved(true);
    sections[1].idstr = other;
    assert!(destination.load(&sections).unwrap());
}

#[test]
fn a_missing_section_is_named_unless_it_is_optional() {
    let (mut first, mut bell) = (Button::default(), Button::default());
    let mut destination = Registry::new("microvm");
    destination.add("bell", 0, &mut bell).unwrap();
    destination.add("button", 0, &mut first).unwrap();
    let sections = [saved(true).remove(0)];
    let error = destination.load(&sections).unwrap_err();
    assert!(matches!(kind(&error), RegistryError::Missing { idstr, instance_id: 0 } if *idstr == *"bell"), "{error}");
    destination.optional("bell", 0).unwrap();
    assert!(matches!(destination.optional("bell", 1), Err(RegistryError::Unknown { instance_id: 1, .. })));
    // Without `globalstate` the guest is taken to have run, as by QEMU.
    assert!(destination.load(&sections).unwrap());
    drop(destination);
    assert_eq!((first.pressed, bell), (3, Button::default()));
}

#[test]
fn what_does_not_fit_is_refused_and_no_device_changes() {
    let newer = |section: &mut DeviceSection| section.version_id = 3;
    let older = |section: &mut DeviceSection| section.version_id = 1;
    let long = |section: &mut DeviceSection| section.body.push(0);
    let short = |section: &mut DeviceSection| section.body.truncate(6);
    let refused = |section: &mut DeviceSection| section.body[3] = 100;
    type Change = fn(&mut DeviceSection);
    let cases: [(&str, Change, Fault); 5] = [
        ("newer", newer, Fault::Unsupported),
        ("older", older, Fault::Unsupported),
        ("long", long, Fault::Malformed),
        ("short", short, Fault::Truncated),
        ("refused by its hook", refused, Fault::Mismatch),
    ];
    for (name, change, fault) in cases {
        let (first, second) = (Mutex::new(Button::default()), Mutex::new(Button::default()));
        let mut destination = Registry::new("microvm");
        destination.share("button", 0, &first).unwrap();
        destination.share("button", 1, &second).unwrap();
        let mut sections = saved(true);
        change(&mut sections[1]);
        let error = destination.load(&sections).unwrap_err();
        let RegistryError::Content { idstr, instance_id: 1, source } = kind(&error) else { panic!("{name}: {error}") };
        assert_eq!((idstr.as_str(), source.kind.fault()), (Some("button"), fault), "{name}: {error}");
        assert!(error.to_string().starts_with("section 'button' 1: "), "{error}");
        drop(destination);
        assert_eq!(first.into_inner().unwrap(), Button::default(), "{name}");
        assert_eq!(second.into_inner().unwrap(), Button::default(), "{name}");
    }
}

#[test]
fn a_name_is_given_once_and_can_be_sent() {
    let (mut first, mut second) = (Button::default(), Button::default());
    let mut registry = Registry::new("microvm");
    registry.add("button", 0, &mut first).unwrap();
    assert!(matches!(
        registry.share("button", 0, Arc::new(Mutex::new(Button::default()))),
        Err(RegistryError::Twice { instance_id: 0, .. })
    ));
    assert!(matches!(registry.add("globalstate", 0, &mut second), Err(RegistryError::Twice { .. })));
    assert!(matches!(registry.ignore(""), Err(RegistryError::Name { .. })));
    assert!(matches!(registry.ignore(&"x".repeat(256)), Err(RegistryError::Name { found }) if found.len() == 256));
}

/// A release has no place for state that is there.
#[test]
fn what_no_section_can_hold_is_not_sent() {
    #[derive(VmState, Debug, Clone, Default, PartialEq)]
    #[vmstate(name = "list", version = 1)]
    struct List {
        count: u8,
        #[vmstate(len = *count)]
        items: Vec<u16>,
    }
    let mut list = List { count: 2, items: vec![7] };
    let mut source = Registry::new("microvm");
    source.add("list", 3, &mut list).unwrap();
    let error = source.save(&profile(), true).unwrap_err();
    assert!(
        matches!(kind(&error), RegistryError::Unsavable { idstr, instance_id: 3, .. } if *idstr == *"list"),
        "{error}"
    );
}
