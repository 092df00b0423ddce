//! QMP events: how they are made, who subscribes to them, and who records them.

use parking_lot::Mutex;
use qevm_migration::{Job, Notice};
use serde_json::{Value, json};
use std::sync::mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

/// An event for QMP clients.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, e.g. `STOP`.
    pub name: &'static str,
    /// Its data, if it has any.
    pub data: Option<Value>,
    /// When it happened.
    pub time: SystemTime,
}

impl Event {
    pub(super) fn now(name: &'static str, data: Option<Value>) -> Event {
        Event { name, data, time: SystemTime::now() }
    }

    /// What QMP calls a notice of a migration, if it knows it.
    pub(super) fn of(notice: Notice) -> Option<Event> {
        let (name, data) = match notice {
            Notice::Status(status) => ("MIGRATION", json!({ "status": status.as_str() })),
            Notice::Pass(pass) => ("MIGRATION_PASS", json!({ "pass": pass })),
            _ => return None,
        };
        Some(Event::now(name, Some(data)))
    }

    /// The event as QMP writes it.
    pub(crate) fn to_json(&self) -> Value {
        let time = self.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut message = json!({
            "timestamp": { "seconds": time.as_secs(), "microseconds": time.subsec_micros() },
            "event": self.name,
        });
        if let Some(data) = &self.data {
            message["data"] = data.clone();
        }
        message
    }
}

type Recorder = Box<dyn Fn(&Event, Option<&Job>) + Send>;

/// A QMP client, and a recorder of everything.
#[derive(Default)]
pub(super) struct Audience {
    subscriber: Mutex<Option<mpsc::Sender<Event>>>,
    recorder: Mutex<Option<Recorder>>,
}

impl Audience {
    pub(super) fn subscribe(&self) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel();
        *self.subscriber.lock() = Some(sender);
        receiver
    }

    pub(super) fn unsubscribe(&self) {
        *self.subscriber.lock() = None;
    }

    pub(super) fn set_recorder(&self, recorder: Recorder) {
        *self.recorder.lock() = Some(recorder);
    }

    /// Tells the subscriber.
    pub(super) fn tell(&self, event: Event) {
        let mut subscriber = self.subscriber.lock();
        if subscriber.as_ref().is_some_and(|sender| sender.send(event).is_err()) {
            *subscriber = None;
        }
    }

    pub(super) fn record(&self, event: &Event, migration: Option<&Job>) {
        if let Some(recorder) = &*self.recorder.lock() {
            recorder(event, migration);
        }
    }
}
