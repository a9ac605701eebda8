//! Calls that fail on purpose.

/// A kind of call, for counting and for faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is named after the call")]
pub enum Call {
    Read,
    Write,
    Sync,
    SetLen,
    Allocate,
    Open,
    Create,
    Rename,
    Unlink,
    FolderSync,
}

impl Call {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Read,
        Self::Write,
        Self::Sync,
        Self::SetLen,
        Self::Allocate,
        Self::Open,
        Self::Create,
        Self::Rename,
        Self::Unlink,
        Self::FolderSync,
    ];
}

/// A call that fails on purpose.
#[derive(Clone, Debug)]
pub struct Fault {
    pub(super) call: Option<Call>,
    pub(super) skip: u64,
    pub(super) errno: i32,
    pub(super) for_ever: bool,
    pub(super) drops_data: bool,
}

impl Fault {
    /// The next call of this kind fails with `errno`, and no other.
    pub fn once(call: Call, errno: i32) -> Self {
        Self { call: Some(call), skip: 0, errno, for_ever: false, drops_data: false }
    }

    /// The next call of any kind fails.
    pub fn any(errno: i32) -> Self {
        Self { call: None, skip: 0, errno, for_ever: false, drops_data: false }
    }

    /// That many calls go well before.
    #[must_use]
    pub fn after(mut self, calls: u64) -> Self {
        self.skip = calls;
        self
    }

    /// Every later call of the kind fails as well.
    #[must_use]
    pub fn for_ever(mut self) -> Self {
        self.for_ever = true;
        self
    }

    /// For syncs: what was written is forgotten, and later syncs succeed without it (R7).
    #[must_use]
    pub fn dropping_data(mut self) -> Self {
        self.drops_data = true;
        self
    }
}
