//! The guest that leaves.

use super::{Vmm, legality};
use qevm_migration::cpr::{self, Passed, Successor};
use qevm_migration::{
    Address, Endpoint, Job, MigrationError, Mode, NoDescriptors, Outgoing, Refused, Statistics, check_transport,
    migrate,
};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

/// Connections that are there already, or are to be opened.
struct WayOut {
    address: Address,
    opened: Option<Outgoing>,
}

impl WayOut {
    fn open(self, job: &Job) -> Result<Outgoing, MigrationError> {
        self.opened.map_or_else(|| Outgoing::open(&self.address, job, &mut NoDescriptors), Ok)
    }
}

impl Vmm {
    /// Begins a migration to `address`, which goes on in a thread of its own.
    ///
    /// # Errors
    /// [`MigrationError::Refused`] for [`Refused::Blocked`] and as [`legality::MIGRATE`] says; [`MigrationError::Tls`]
    /// for credentials that are not there; [`MigrationError::Capability`] for capabilities that do not go with the
    /// transport, or with the release at the other end; and for what is no socket, what [`Outgoing::open`] says.
    pub fn migrate(self: &Arc<Self>, address: Address) -> Result<(), MigrationError> {
        self.migrate_by(address, None)
    }

    /// The same, to a process of this host that is passed the guest's memory at `cpr` before (mode `cpr-transfer`).
    ///
    /// # Errors
    /// As [`migrate`](Self::migrate); and [`MigrationError::Connect`] where no process waits at `cpr`.
    pub fn migrate_by(self: &Arc<Self>, address: Address, cpr: Option<Address>) -> Result<(), MigrationError> {
        legality::check(legality::MIGRATE, &self.situation())?;
        cpr::check(&address, cpr.as_ref(), &self.outgoing, &self.machine.memory().passable().1)?;
        if let Some(reason) = self.blockers().into_iter().next() {
            return Err(Refused::Blocked(reason).into());
        }
        self.check_devices()?;
        self.outgoing.capabilities().suit(self.profile().qemu)?;
        let secured = self.secure(&self.outgoing, Endpoint::Client);
        // What does not go with the transport is refused whether the credentials are there or not.
        check_transport(&address, &self.outgoing)?;
        secured?;
        // Once more, for the migration before may have ended meanwhile, with the guest gone.
        self.outgoing.begin_if(|status| legality::check(legality::MIGRATE, &self.situation_with(status)))?;
        let successor = cpr.filter(|_| self.outgoing.parameters().mode == Mode::CprTransfer);
        let successor = successor.map(|cpr| Successor::connect(&cpr)).transpose();
        let successor = successor.inspect_err(|error| self.outgoing.end(Some(error)))?;
        let connections = self.way_out(&address).inspect_err(|error| self.outgoing.end(Some(error)))?;
        self.lock().shares = successor.is_some();
        let vmm = self.clone();
        thread::spawn(move || {
            let job = &vmm.outgoing;
            let passed = successor.map_or(Ok(()), |successor| vmm.pass_memory(successor));
            let result = match passed.and_then(|()| connections.open(job)) {
                Ok(connections) => migrate(&*vmm, &connections, job, &vmm.profile()),
                Err(error) => {
                    job.end(Some(&error));
                    Err(error)
                }
            };
            let Statistics { ram, rounds, downtime, total_time, .. } = job.statistics();
            let (rounds, bytes) = (rounds.len(), ram.transferred);
            match result {
                Ok(_) => tracing::info!(
                    "the guest has left to {address}: {rounds} rounds, {bytes} bytes, downtime {:?}, {total_time:?} in all",
                    downtime.unwrap_or_default()
                ),
                Err(error) => {
                    tracing::warn!("migration to {address} failed after {rounds} rounds and {bytes} bytes: {error}");
                }
            }
        });
        Ok(())
    }

    /// Lets a postcopy that is paused go on to `address`, where the same destination waits for that (`migrate` with
    /// `resume`).
    ///
    /// # Errors
    /// As [`Job::may_recover`] says; and as [`migrate`](Self::migrate) for the address.
    pub fn resume_migration(self: &Arc<Self>, address: &Address) -> Result<(), MigrationError> {
        self.outgoing.may_recover()?;
        self.secure(&self.outgoing, Endpoint::Client)?;
        check_transport(address, &self.outgoing)?;
        let connections = self.way_out(address)?;
        self.outgoing.begin_recovery()?;
        let vmm = self.clone();
        // The thread of the migration goes on with them.
        thread::spawn(move || vmm.outgoing.recover(connections.open(&vmm.outgoing)));
        Ok(())
    }

    fn pass_memory(&self, successor: Successor) -> Result<(), MigrationError> {
        let (files, _) = self.machine.memory().passable();
        let files = files.into_iter().map(|(name, file)| Passed { name: name.into(), id: 0, descriptor: file.as_fd() });
        successor.pass(&files.collect::<Vec<_>>(), &self.outgoing, &self.profile())
    }

    /// A socket may take long to connect; everything else is there or not.
    fn way_out(&self, address: &Address) -> Result<WayOut, MigrationError> {
        let opened = if address.is_socket() {
            None
        } else {
            Some(Outgoing::open(address, &self.outgoing, &mut *self.descriptors())?)
        };
        Ok(WayOut { address: address.clone(), opened })
    }
}
