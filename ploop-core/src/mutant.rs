//! Deliberate breaches of the write protocol, to prove that the tests would see them.
//!
//! Each [`Mutant`] is one mistake that loses data. Code that keeps the rule asks [`is_active`] at the very place
//! where the rule could be broken; without the feature "testing" the answer is a constant `false` and the question
//! costs nothing. The crash simulator runs single-threaded, so a mutant is active for one thread only.

/// Writes the list once: every mutant that there is, is gone through wherever all are.
macro_rules! mutants {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// One broken rule (numbers of the test programme, section 1).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Mutant {
            $($(#[$doc])* $name,)*
        }

        impl Mutant {
            /// Every mutant. `examples/mutants.rs` asks of each whether the last test run found it.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

mutants! {
    /// M1: table written before the sync that makes content durable.
    TableBeforeContentSync,
    /// M2: that first sync left out.
    NoContentSync,
    /// M3: one sync for content and table together.
    SingleSync,
    /// M4: a copied-up cluster published before its content is complete.
    PublishBeforeComplete,
    /// M5: a freed cluster reused before its clearing is durable.
    ReuseBeforeClearDurable,
    /// M6: a freed cluster punched after it was handed out again.
    PunchAfterReuse,
    /// M7: the in-use mark cleared before the last sync.
    ClosedBeforeLastSync,
    /// M8: a file renamed without having been synced.
    RenameUnsyncedFile,
    /// M9: a rename without a sync of the folder.
    RenameWithoutFolderSync,
    /// M10: the header sector rewritten from a stale copy, losing entries 0..111.
    StaleHeaderSector,
    /// M11: an error of a sync ignored.
    SyncErrorIgnored,
    /// M12: a failed sync tried again.
    SyncRetried,
    /// M13: a size extension not synced before a pointer to it.
    ExtensionNotSynced,
    /// M14: a repair that does not survive being cut in the middle: its table is written before what it points to.
    RepairNotRepeatable,
    /// M15: copied-up data written to the wrong place when a hole is reused.
    CopyUpMisplaced,
    /// M16: tracker marked before the write only.
    MarkBeforeWrite,
    /// M17: a change of the table and its record in the log of pending entries not one step against the seals.
    LoggedApart,
    /// A moved cluster entered before its new place is durable.
    MoveNotSynced,
    /// The header of a longer table written before the room of that table is durably empty.
    HeaderBeforeTableSync,
    /// A chain replaced while bytes that were written in place in the old top are not synced.
    InPlaceUnsynced,
    /// A freed place punched while a read that began with a former chain may use it.
    FormerReadsForgotten,
    /// A new image named by the descriptor without having been synced.
    NewImageUnsynced,
    /// A new image named by the descriptor while its own name is not durable.
    NewNameUnsynced,
    /// A new image made whose name the descriptor does not announce: nobody knows what a crash leaves of it.
    NotAnnounced,
    /// A snapshot merged into while the descriptor still calls it a state of the disk.
    MergeUnmarked,
    /// The table of a merge's target written before the clusters it points to are durable.
    MergedTableEarly,
    /// A merge committed before it is done.
    CommitBeforeMerge,
    /// The file of a state removed before the descriptor does without it.
    RemovedBeforeCommit,
    /// An image made smaller before the descriptor says so.
    SmallerBeforeDescriptor,
    /// The descriptor calls the disk larger before its image is.
    LargerBeforeImage,
    /// The tail cut off while the table that no longer points there is not durable.
    CutBeforeTableSync,
    /// A conversion that does not say beforehand which files are its own.
    ConvertUnplanned,
    /// A top that grows does not hide what a larger delta below it holds.
    GrownUnhidden,
    /// A flush answered after a new chain took over and before its descriptor is durable.
    FlushBeforeSettled,
}

#[cfg(any(test, feature = "testing"))]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Breaks one rule on this thread, or none.
#[cfg(any(test, feature = "testing"))]
pub fn activate(mutant: Option<Mutant>) {
    ACTIVE.set(mutant);
}

/// Whether this thread is to break that rule.
#[cfg(any(test, feature = "testing"))]
pub fn is_active(mutant: Mutant) -> bool {
    ACTIVE.get() == Some(mutant)
}

/// Whether this thread is to break that rule: never, outside tests.
#[cfg(not(any(test, feature = "testing")))]
#[inline]
pub const fn is_active(_mutant: Mutant) -> bool {
    false
}
