//! The JSON description of one save: which fields were written, with which sizes (spec: vmdesc).
//!
//! A description is made while a value is encoded ([`encode_described`](super::encode_described)), because it tells of
//! the conditions and lengths of that very save. For the static schema see [`Description`](super::Description).

use std::fmt::Write as _;

/// A described VMSD: the value of `struct`, an entry of `subsections`, or a device without its `name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Key `vmsd_name`.
    pub vmsd_name: &'static str,
    /// Key `version`.
    pub version: u32,
    /// Key `fields`.
    pub fields: Vec<Entry>,
    /// Key `subsections`, left out when empty.
    pub subsections: Vec<Object>,
}

/// A described field: an object in `fields`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Key `name`, with the `[k]` that QEMU appends to names occurring several times.
    pub name: &'static str,
    /// Key `array_len` or `index`.
    pub array: Array,
    /// Key `type`.
    pub type_name: &'static str,
    /// What the field contains.
    pub nested: Nested,
    /// Key `size`: bytes of one element.
    pub size: u64,
}

/// How a field object says that it belongs to an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Array {
    /// No key: a single value, or an element that the release does not number.
    No,
    /// `array_len`: this entry stands for so many elements.
    Len(u64),
    /// `index`: this entry is the element of that number.
    Index(u64),
}

/// Nested descriptions of a field object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Nested {
    /// None.
    No,
    /// Key `struct`.
    Struct(Object),
    /// Key `struct` with an empty object: a NULL pointer in 5.2 and 7.2.
    EmptyStruct,
    /// The keys of each object in the field object itself, so that keys repeat when there are several.
    Inline(Vec<Object>),
}

/// The layout of the JSON text, which never matters to a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextStyle {
    /// `{"page_size": 4096}` (seen in 7.2 and later).
    Compact,
    /// `{ "page_size" : 4096 }` (5.2).
    Spaced,
}

impl Object {
    /// The object of a device in the description's `devices` list.
    ///
    /// ```
    /// use qevm_savevm::vmstate::{self, Context, VmState, instance::TextStyle};
    /// use qevm_wire::QemuVersion;
    ///
    /// #[derive(VmState, Default)]
    /// #[vmstate(name = "toy", version = 1)]
    /// struct Toy { control: u32 }
    ///
    /// let ctx = Context::new(QemuVersion::new(10, 0), "microvm");
    /// let (_, described) = vmstate::encode_described(&Toy::default(), 1, &ctx)?;
    /// assert_eq!(described.device_json("0000:00:04.0/toy", 0, TextStyle::Compact),
    ///     r#"{"name": "0000:00:04.0/toy", "instance_id": 0, "vmsd_name": "toy", "version": 1, "#.to_string() +
    ///     r#""fields": [{"name": "control", "type": "uint32", "size": 4}]}"#);
    /// # Ok::<(), qevm_savevm::Error>(())
    /// ```
    pub fn device_json(&self, idstr: &str, instance_id: u32, style: TextStyle) -> String {
        let mut text = Text::new(style);
        text.object(|text| {
            text.string("name", idstr);
            text.number("instance_id", instance_id.into());
            self.keys(text);
        });
        text.out
    }

    fn keys(&self, text: &mut Text) {
        text.string("vmsd_name", self.vmsd_name);
        text.number("version", self.version.into());
        text.list("fields", &self.fields, Entry::write);
        if !self.subsections.is_empty() {
            text.list("subsections", &self.subsections, |object, text| text.object(|text| object.keys(text)));
        }
    }
}

impl Entry {
    fn write(&self, text: &mut Text) {
        text.object(|text| {
            text.string("name", self.name);
            match self.array {
                Array::No => {}
                Array::Len(n) => text.number("array_len", n),
                Array::Index(n) => text.number("index", n),
            }
            text.string("type", self.type_name);
            match &self.nested {
                Nested::No => {}
                Nested::Struct(object) => {
                    text.key("struct");
                    text.object(|text| object.keys(text));
                }
                Nested::EmptyStruct => {
                    text.key("struct");
                    text.object(|_| {});
                }
                Nested::Inline(objects) => objects.iter().for_each(|object| object.keys(text)),
            }
            text.number("size", self.size);
        });
    }
}

struct Text {
    out: String,
    style: TextStyle,
    first: bool,
}

impl Text {
    fn new(style: TextStyle) -> Self {
        Text { out: String::new(), style, first: true }
    }

    fn object(&mut self, content: impl FnOnce(&mut Self)) {
        self.brackets('{', '}', content);
    }

    fn list<T>(&mut self, key: &str, items: &[T], mut write: impl FnMut(&T, &mut Self)) {
        self.key(key);
        self.brackets('[', ']', |text| {
            for item in items {
                text.separator();
                write(item, text);
            }
        });
    }

    fn string(&mut self, key: &str, value: &str) {
        self.key(key);
        self.quoted(value);
    }

    fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        // Writing to a string cannot fail.
        let _ = write!(self.out, "{value}");
    }

    fn key(&mut self, key: &str) {
        self.separator();
        self.quoted(key);
        self.out.push_str(if self.style == TextStyle::Spaced { " : " } else { ": " });
    }

    fn quoted(&mut self, value: &str) {
        self.out.push('"');
        for c in value.chars() {
            match c {
                '"' | '\\' => self.out.extend(['\\', c]),
                c if (c as u32) < 0x20 => {
                    let _ = write!(self.out, "\\u{:04x}", c as u32);
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn separator(&mut self) {
        if !std::mem::take(&mut self.first) {
            self.out.push_str(", ");
        }
    }

    fn brackets(&mut self, open: char, close: char, content: impl FnOnce(&mut Self)) {
        self.out.push(open);
        self.pad();
        self.first = true;
        content(self);
        self.first = false;
        self.pad();
        self.out.push(close);
    }

    fn pad(&mut self) {
        if self.style == TextStyle::Spaced {
            self.out.push(' ');
        }
    }
}
