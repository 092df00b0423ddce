//! The description as text, in QEMU's layout.

use super::model::{Description, DeviceBody, DeviceDescription, FieldDescription, StructDescription};
use std::fmt::Write as _;

/// The type name of a field whose structure stands under a key of its own rather than among the field's keys.
const STRUCT: &str = "struct";

/// White space in the text, which never matters to a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextStyle {
    /// `{"page_size": 4096}` (seen in 7.2 and later).
    Compact,
    /// `{ "page_size" : 4096 }` (5.2).
    Spaced,
}

impl Description {
    /// The text that QEMU writes for this description.
    ///
    /// ```
    /// use qevm_savevm::vmdesc::{Description, TextStyle};
    /// use qevm_wire::Limits;
    ///
    /// let text = br#"{"page_size": 4096, "devices": [{"name": "slirp", "instance_id": 0, "size": 3, "#.to_vec();
    /// let text = [text, br#""fields": [{"name": "data", "size": 3, "type": "buffer"}]}]}"#.to_vec()].concat();
    /// let description = Description::parse(&text, &Limits::default())?;
    /// assert_eq!(description.to_json(TextStyle::Compact).as_bytes(), text);
    /// # Ok::<(), qevm_savevm::Error>(())
    /// ```
    pub fn to_json(&self, style: TextStyle) -> String {
        let mut text = Text::new(style);
        text.object(|text| {
            if let Some(configuration) = &self.configuration {
                text.key("configuration");
                text.object(|text| configuration.keys(text));
            }
            if let Some(page_size) = self.page_size {
                text.number("page_size", page_size);
            }
            text.list("devices", &self.devices, DeviceDescription::write);
        });
        text.out
    }
}

impl DeviceDescription {
    fn write(&self, text: &mut Text) {
        text.object(|text| {
            text.string("name", &self.name);
            text.number("instance_id", self.instance_id.into());
            match &self.body {
                DeviceBody::Struct(structure) => structure.keys(text),
                DeviceBody::OldStyle { size } => {
                    text.number("size", *size);
                    text.list("fields", &[*size], |size, text| {
                        text.object(|text| {
                            text.string("name", "data");
                            text.number("size", *size);
                            text.string("type", "buffer");
                        });
                    });
                }
            }
        });
    }
}

impl StructDescription {
    fn keys(&self, text: &mut Text) {
        text.string("vmsd_name", &self.vmsd_name);
        text.number("version", self.version.into());
        text.list("fields", &self.fields, FieldDescription::write);
        if !self.subsections.is_empty() {
            text.list("subsections", &self.subsections, |object, text| text.object(|text| object.keys(text)));
        }
    }
}

impl FieldDescription {
    fn write(&self, text: &mut Text) {
        text.object(|text| {
            text.string("name", &self.name);
            if let Some(n) = self.array_len {
                text.number("array_len", n);
            }
            if let Some(n) = self.index {
                text.number("index", n);
            }
            text.string("type", &self.type_name);
            if self.type_name == STRUCT {
                // Without a structure (a NULL pointer in 5.2 and 7.2) the object is empty.
                text.key(STRUCT);
                text.object(|text| self.nested.iter().for_each(|structure| structure.keys(text)));
            } else {
                // A list has the keys of each of its elements: they repeat.
                self.nested.iter().for_each(|structure| structure.keys(text));
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
