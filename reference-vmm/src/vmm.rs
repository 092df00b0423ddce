//! A machine with its run state and its migrations: what QMP controls.

mod actions;
mod announcing;
mod capabilities;
mod dirty_limit;
mod events;
mod exit;
mod guest;
mod incoming;
pub mod legality;
mod lifecycle;
mod origin;
mod outgoing;
mod predecessor;
mod run_state;
mod running;
mod vfio;

pub use actions::{ACTIONS, Actions, Reboot, Shutdown, UnknownAction};
pub use dirty_limit::LimitRefused;
pub use events::Event;
pub use exit::{Cause, Exit, Sender};
pub use run_state::RunState;

use self::announcing::Announcers;
use self::events::Audience;
use self::legality::{ArrivalState, Situation};
use crate::descriptors::Descriptors;
use crate::machine::Machine;
use crate::objects::Objects;
use parking_lot::{Condvar, Mutex, MutexGuard};
use qevm_migration::dirty_rate::{self, Gauge};
use qevm_migration::{Address, BlockTimes, Endpoint, Guest, Job, MigrationError, Recovery, RestoreProgress, Status};
use qevm_wire::{Profile, QemuVersion};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

/// A machine with its run state and its migrations.
pub struct Vmm {
    machine: Machine,
    profile: Mutex<Profile>,
    dirty_rate: Gauge,
    /// Why the machine cannot migrate.
    blockers: Mutex<Vec<String>>,
    /// The outgoing migration.
    outgoing: Arc<Job>,
    /// The incoming migration.
    incoming: Arc<Job>,
    /// Tells how far the loading of memory is of a guest that runs already.
    rest: Mutex<Option<Watch>>,
    /// Tells how long a guest has waited for its memory that runs already.
    block_times: Mutex<Option<BlockTimesWatch>>,
    /// Pauses and recovers a postcopy to here.
    recovery: Mutex<Option<Recovery>>,
    /// Whose guest is in the machine's memory.
    origin: Mutex<origin::Origin>,
    descriptors: Mutex<Descriptors>,
    objects: Objects,
    state: Mutex<State>,
    /// Held while the vCPUs are started or stopped, the machine is reset, or its devices are saved or loaded.
    transition: Mutex<()>,
    /// Wakes the thread that attends to the guest's stops and to resets.
    asks: mpsc::Sender<()>,
    changed: Condvar,
    announcers: Announcers,
    audience: Audience,
}

type Watch = Box<dyn Fn() -> RestoreProgress + Send + Sync>;
type BlockTimesWatch = Box<dyn Fn() -> Option<BlockTimes> + Send + Sync>;

struct State {
    run_state: RunState,
    /// What it was before a migration stopped the guest.
    before_migration: RunState,
    /// Start the guest when it has arrived, if it ran at the source.
    autostart: bool,
    /// An incoming migration was asked for, now or later.
    incoming: bool,
    listening: Option<Address>,
    started_at: Option<Duration>,
    exit: Option<Exit>,
    actions: Actions,
    reset_wanted: bool,
    /// A migration has saved the devices: what happens to the guest here does not travel any more.
    saved: bool,
    /// The migration passes the guest's memory to another process: once the guest has left, it runs in that.
    shares: bool,
    /// The guest runs in another process, in the memory that this machine still has: nothing may be written to it here.
    given_away: bool,
    /// A migration has brought the guest, which may not have been started yet.
    loaded: bool,
    /// An incoming migration has failed and left something in the RAM.
    tried: bool,
    /// Memory of a guest that runs already is loaded before it is touched, too.
    load_ahead: bool,
}

impl Vmm {
    /// Takes over a machine that has not run. `incoming` says that it waits for a migration.
    pub fn new(machine: Machine, profile: Profile, incoming: bool) -> Arc<Vmm> {
        let run_state = if incoming { RunState::Inmigrate } else { RunState::Prelaunch };
        let state = State {
            run_state,
            before_migration: run_state,
            autostart: true,
            incoming,
            listening: None,
            started_at: None,
            exit: None,
            actions: Actions::default(),
            reset_wanted: false,
            saved: false,
            shares: false,
            given_away: false,
            loaded: false,
            tried: false,
            load_ahead: true,
        };
        let (asks, asked) = mpsc::channel();
        let blockers = Mutex::new(machine.vfio().blockers());
        let vmm = Arc::new(Vmm {
            machine,
            profile: Mutex::new(profile),
            dirty_rate: Gauge::default(),
            blockers,
            outgoing: Arc::default(),
            incoming: Arc::default(),
            rest: Mutex::default(),
            block_times: Mutex::default(),
            recovery: Mutex::default(),
            origin: Mutex::default(),
            descriptors: Mutex::default(),
            objects: Objects::default(),
            state: Mutex::new(state),
            transition: Mutex::default(),
            asks,
            changed: Condvar::new(),
            announcers: Announcers::default(),
            audience: Audience::default(),
        });
        for job in [&vmm.outgoing, &vmm.incoming] {
            job.set_uuid(vmm.machine.uuid());
            let (weak, job_of) = (Arc::downgrade(&vmm), Arc::downgrade(job));
            job.watch(move |notice| {
                let (Some(vmm), Some(job)) = (weak.upgrade(), job_of.upgrade()) else { return };
                if let Some(event) = Event::of(notice) {
                    vmm.audience.record(&event, Some(&job));
                    if vmm.outgoing.capabilities().events {
                        vmm.audience.tell(event);
                    }
                }
            });
        }
        vmm.tell_of_device_states();
        vmm.attend_when_asked(asked);
        vmm
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The switches of the QEMU release that is at the other end of the next migration.
    pub fn profile(&self) -> Profile {
        self.profile.lock().clone()
    }

    /// Says of which QEMU release the other end of the next migration is. It does not change one that has begun.
    /// `kvm` is false for one under TCG.
    pub fn set_peer(&self, release: QemuVersion, kvm: bool) {
        let profile = Profile::new(release, self.machine.machine_type());
        let profile = if kvm { profile } else { profile.tcg() };
        *self.profile.lock() = profile;
    }

    /// Settings and state of the outgoing migration. Capabilities and parameters of an incoming one are the same.
    pub fn outgoing(&self) -> &Job {
        &self.outgoing
    }

    /// State of the incoming migration.
    pub fn incoming(&self) -> &Job {
        &self.incoming
    }

    /// What decides which commands are legal now.
    pub fn situation(&self) -> Situation {
        self.situation_with(self.outgoing.status())
    }

    fn situation_with(&self, outgoing: Status) -> Situation {
        let arrival = match (self.expects_guest(), self.may_listen()) {
            (false, _) => ArrivalState::NotExpected,
            (true, true) => ArrivalState::Deferred,
            (true, false) => ArrivalState::Started,
        };
        Situation { run_state: self.run_state(), outgoing, arrival }
    }

    /// Where an incoming migration is waited for.
    pub fn listening(&self) -> Option<Address> {
        self.lock().listening.clone()
    }

    /// Starts to measure how fast the guest dirties memory, in a thread of its own.
    ///
    /// # Errors
    /// [`dirty_rate::Refused`].
    pub fn measure_dirty_rate(
        self: &Arc<Self>,
        time: Duration,
        mode: dirty_rate::Mode,
        sample_pages: Option<u64>,
    ) -> Result<(), dirty_rate::Refused> {
        let rings = self.machine.dirty_log().ring_size() > 0;
        self.dirty_rate.begin(time, mode, sample_pages, rings)?;
        let vmm = self.clone();
        thread::spawn(move || {
            let written = |time| Ok(vmm.machine.dirty_log().written_in(time)?);
            vmm.dirty_rate.measure(&*vmm, || vmm.machine.start_dirty_log(), written);
        });
        Ok(())
    }

    /// What was last measured of how fast the guest dirties memory.
    pub fn dirty_rate(&self) -> dirty_rate::Report {
        self.dirty_rate.report()
    }

    /// Forbids to migrate, as a device does whose state cannot travel, until the same reason is
    /// [taken back](Vmm::unblock_migration). It does not end a migration that has begun.
    pub fn block_migration(&self, reason: impl Into<String>) {
        self.lock_blockers().push(reason.into());
    }

    /// Takes back one [`block_migration`](Vmm::block_migration) of this reason.
    pub fn unblock_migration(&self, reason: &str) {
        let mut blockers = self.lock_blockers();
        if let Some(index) = blockers.iter().position(|blocker| blocker == reason) {
            blockers.remove(index);
        }
    }

    /// Why the machine cannot migrate; empty if it can.
    pub fn blockers(&self) -> Vec<String> {
        self.lock_blockers().clone()
    }

    /// The descriptors that others have opened for this monitor.
    pub fn descriptors(&self) -> MutexGuard<'_, Descriptors> {
        self.descriptors.lock()
    }

    /// What `object-add` and `--object` have made.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Has the connections of `job` secured as the parameters say.
    fn secure(&self, job: &Job, side: Endpoint) -> Result<(), MigrationError> {
        let tls = self.objects.tls(&self.outgoing.parameters(), side);
        job.set_tls(tls.map_err(|error| MigrationError::Tls(error.into()))?);
        Ok(())
    }

    /// Makes [`wait`](Vmm::wait) return.
    pub fn end(&self, exit: Exit) {
        let mut state = self.lock();
        if state.exit.is_some() {
            return;
        }
        // Before the end itself, so that a client that waits for that can rely on it.
        self.tell_of_end(&exit);
        state.exit = Some(exit);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits up to `timeout` for the end of the monitor.
    pub fn wait(&self, timeout: Duration) -> Option<Exit> {
        let mut state = self.lock();
        self.changed.wait_while_for(&mut state, |state| state.exit.is_none(), timeout);
        state.exit.clone()
    }

    /// The events from now on. There is one subscriber at a time.
    pub fn subscribe(&self) -> mpsc::Receiver<Event> {
        self.audience.subscribe()
    }

    /// From now on `recorder` gets every event, whatever other clients get and whatever capability `events` says, with
    /// the migration if that is what it is about. It must not block. There is one at a time.
    pub fn record_events(&self, recorder: impl Fn(&Event, Option<&Job>) + Send + 'static) {
        self.audience.set_recorder(Box::new(recorder));
    }

    /// Ends the subscription; the subscriber still gets what has happened.
    pub(crate) fn unsubscribe(&self) {
        self.audience.unsubscribe();
    }

    /// Tells the subscriber, and the recorder.
    pub(crate) fn emit(&self, event: Event) {
        self.audience.record(&event, None);
        self.audience.tell(event);
    }

    fn transition(&self) -> MutexGuard<'_, ()> {
        self.transition.lock()
    }

    fn lock_blockers(&self) -> MutexGuard<'_, Vec<String>> {
        self.blockers.lock()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}
