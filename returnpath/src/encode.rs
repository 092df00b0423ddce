//! The encoder of the return path: events in, bytes out. The mirror of [`decode`](crate::decode).

use crate::message::{BITMAP_END, Message};
use crate::{Error, Event, MessageError};
use qevm_wire::{Located, Writer};

/// Writes the messages of a return path, and sees to it that none follows SHUT and that a bitmap is ended.
///
/// ```
/// use qevm_returnpath::{Encoder, Message};
/// use qevm_wire::Writer;
///
/// let (mut encoder, mut writer) = (Encoder::default(), Writer::new());
/// encoder.message(&Message::Shut { status: 0 }, &mut writer)?;
/// assert!(encoder.message(&Message::ResumeAck, &mut writer).is_err());
/// assert_eq!(writer.as_bytes(), [0, 1, 0, 4, 0, 0, 0, 0]);
/// # Ok::<(), qevm_returnpath::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Encoder {
    in_bitmap: bool,
    shut: bool,
}

impl Encoder {
    /// Appends a message. After [`Message::RecvBitmap`] the caller writes the bitmap, then calls
    /// [`bitmap_end`](Self::bitmap_end).
    ///
    /// # Errors
    /// [`MessageError::Order`] after SHUT or inside a bitmap. Nothing is appended then.
    pub fn message(&mut self, message: &Message, writer: &mut Writer) -> Result<(), Error> {
        let what = message.message_type().name();
        if self.shut {
            return Err(misplaced(what, "comes after SHUT, the last message", writer));
        }
        if self.in_bitmap {
            return Err(misplaced(what, "comes before the end of a bitmap", writer));
        }
        message.encode(writer);
        self.in_bitmap = matches!(message, Message::RecvBitmap { .. });
        self.shut = matches!(message, Message::Shut { .. });
        Ok(())
    }

    /// Appends the end mark of a bitmap, which the caller has written.
    ///
    /// # Errors
    /// [`MessageError::Order`] if no bitmap was announced. Nothing is appended then.
    pub fn bitmap_end(&mut self, writer: &mut Writer) -> Result<(), Error> {
        if !self.in_bitmap {
            return Err(misplaced("end of a bitmap", "comes without RECV_BITMAP", writer));
        }
        writer.be64(BITMAP_END);
        self.in_bitmap = false;
        Ok(())
    }

    /// Appends what a [`Decoder`](crate::Decoder) gave, without its payload.
    ///
    /// # Errors
    /// As [`message`](Self::message) and [`bitmap_end`](Self::bitmap_end).
    pub fn event(&mut self, event: &Event, writer: &mut Writer) -> Result<(), Error> {
        match event {
            Event::Message(message) => self.message(message, writer),
            Event::BitmapEnd => self.bitmap_end(writer),
        }
    }
}

fn misplaced(what: &'static str, place: &'static str, writer: &Writer) -> Error {
    Located::new(MessageError::Order { what, place }.into(), writer.len() as u64).within("return path")
}
