//! NCCL's functions, loaded while the program runs, so that it is needed neither to build nor to run
//! without GPUs. Names, types and numbers are those of nccl.h.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::num::NonZeroUsize;
use std::path::Path;
use std::ptr;
use std::sync::Arc;

use libloading::Library;
use tch::{Kind, Tensor};

use crate::mpi_buffers::Reduction;

const SUCCESS: c_int = 0;

/// `ncclUint8`: what is only moved and has no type of its own travels as bytes.
const BYTES: c_int = 1;

/// Bytes of the identity that the ranks of a group begin with.
pub(super) const ID_BYTES: usize = 128;

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; ID_BYTES]);

/// Nobody else's stream: libtorch computes on the null stream too, so that what it enqueued before a
/// collective comes before it.
const STREAM: *mut c_void = ptr::null_mut();

type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type CommInitRank = unsafe extern "C" fn(*mut *mut c_void, c_int, UniqueId, c_int) -> c_int;
type CommAbort = unsafe extern "C" fn(*mut c_void) -> c_int;
type CommGetAsyncError = unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int;
type GetErrorString = unsafe extern "C" fn(c_int) -> *const c_char;
type Group = unsafe extern "C" fn() -> c_int;
/// From, to, count, type, operation.
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    *mut c_void,
    *mut c_void,
) -> c_int;
/// From, to, count, type, root.
type Broadcast = AllReduce;
/// From, to, count of one rank, type.
type AllGather = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    *mut c_void,
    *mut c_void,
) -> c_int;

/// What this crate calls of NCCL.
pub(super) struct Nccl {
    get_unique_id: GetUniqueId,
    comm_init_rank: CommInitRank,
    comm_abort: CommAbort,
    comm_get_async_error: CommGetAsyncError,
    get_error_string: GetErrorString,
    group_start: Group,
    group_end: Group,
    all_reduce: AllReduce,
    broadcast: Broadcast,
    all_gather: AllGather,
    /// The functions live as long as it does.
    _library: Library,
}

impl Nccl {
    pub(super) fn load(path: &Path) -> Result<Self, String> {
        // SAFETY: NCCL, whose initialisers libtorch runs as well.
        let library = unsafe { Library::new(path) }.map_err(|error| text_of(path, &error))?;
        /// One function by its name; the field says its type.
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type is the one of this name in nccl.h.
                *unsafe { library.get($name) }.map_err(|error| text_of(path, &error))?
            };
        }
        Ok(Self {
            get_unique_id: function!(b"ncclGetUniqueId"),
            comm_init_rank: function!(b"ncclCommInitRank"),
            comm_abort: function!(b"ncclCommAbort"),
            comm_get_async_error: function!(b"ncclCommGetAsyncError"),
            get_error_string: function!(b"ncclGetErrorString"),
            group_start: function!(b"ncclGroupStart"),
            group_end: function!(b"ncclGroupEnd"),
            all_reduce: function!(b"ncclAllReduce"),
            broadcast: function!(b"ncclBroadcast"),
            all_gather: function!(b"ncclAllGather"),
            _library: library,
        })
    }

    /// What a group begins with: made on one rank, given to all.
    pub(super) fn unique_id(&self) -> Result<Vec<u8>, String> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: room for one identity.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id.0.iter().map(|byte| byte.cast_unsigned()).collect())
    }

    fn check(&self, function: &str, code: c_int) -> Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: any number may be asked for; the answer is a constant of the library.
        let text = unsafe { (self.get_error_string)(code) };
        if text.is_null() {
            return Err(format!("{function} gives {code}"));
        }
        // SAFETY: a text that ends in 0, which lives as long as the library.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        Err(format!("{function} gives {code}, {text}"))
    }
}

/// The first line of an error, with the library's name in any case.
fn text_of(path: &Path, error: &libloading::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    format!("{}: {line}", path.display())
}

/// A communicator of NCCL. It ends with the first error, for which NCCL frees it at once; without one
/// it is never freed: freeing waits for the other ranks, one of which may have failed.
pub(super) struct Ranks {
    nccl: Arc<Nccl>,
    /// The address that NCCL knows it by, until it has ended: a number may be moved to another
    /// thread, and a cell is seen by one thread at a time, so that none uses what another one ends.
    handle: Cell<Option<NonZeroUsize>>,
}

impl Ranks {
    /// Meets the other ranks; each must have made its GPU current.
    pub(super) fn meet(
        nccl: Arc<Nccl>,
        id: &[u8],
        rank: usize,
        world_size: usize,
    ) -> Result<Self, String> {
        let id: &[u8; ID_BYTES] =
            id.try_into().map_err(|_| format!("an identity of {} bytes", id.len()))?;
        let id = UniqueId(id.map(u8::cast_signed));
        let number = |value: usize| c_int::try_from(value).map_err(|error| error.to_string());
        let (rank, world_size) = (number(rank)?, number(world_size)?);
        let mut handle = ptr::null_mut();
        // SAFETY: room for one handle, and an identity that ncclGetUniqueId has made.
        let code = unsafe { (nccl.comm_init_rank)(&mut handle, world_size, id, rank) };
        nccl.check("ncclCommInitRank", code)?;
        let handle = NonZeroUsize::new(handle.expose_provenance());
        let handle = handle.ok_or("ncclCommInitRank gives no communicator")?;
        Ok(Self { nccl, handle: Cell::new(Some(handle)) })
    }

    /// The live communicator.
    fn raw(&self) -> Result<*mut c_void, String> {
        let handle = self.handle.get().ok_or("an error before has ended this group")?;
        Ok(ptr::with_exposed_provenance_mut(handle.get()))
    }

    /// Whether the communicator lives, and what went wrong since, on this rank or on another.
    pub(super) fn check(&self) -> Result<(), String> {
        let (communicator, mut state) = (self.raw()?, SUCCESS);
        // SAFETY: a live communicator and room for one number.
        let code = unsafe { (self.nccl.comm_get_async_error)(communicator, &mut state) };
        self.nccl.check("ncclCommGetAsyncError", code)?;
        self.nccl.check("a collective", state)
    }

    /// Ends what is under way, and the communicator with it: whoever uses it again gets an error.
    pub(super) fn abort(&self) {
        let communicator = self.raw();
        self.handle.set(None);
        if let Ok(communicator) = communicator {
            // SAFETY: a communicator that lived until now and that nobody can reach any more.
            // Whether it could be ended does not matter.
            unsafe { (self.nccl.comm_abort)(communicator) };
        }
    }

    /// Enqueues a reduction in place.
    pub(super) fn all_reduce(
        &self,
        tensor: &mut Tensor,
        kind: c_int,
        reduction: Reduction,
    ) -> Result<(), String> {
        let communicator = self.raw()?;
        let (place, count) = (tensor.data_ptr(), tensor.numel());
        let operation = match reduction {
            Reduction::Sum => 0,
            Reduction::Max => 2,
        };
        // SAFETY: `place` holds `count` elements of this type, which may be both ends of a
        // reduction; the caller waits for it while it holds the tensor. The communicator lives.
        let code = unsafe {
            (self.nccl.all_reduce)(place, place, count, kind, operation, communicator, STREAM)
        };
        self.nccl.check("ncclAllReduce", code)
    }

    /// Enqueues a broadcast in place.
    pub(super) fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), String> {
        let communicator = self.raw()?;
        let (kind, size) = transport(tensor.kind());
        let (place, count) = (tensor.data_ptr(), tensor.numel() * size);
        // SAFETY: as in `all_reduce`; `root` is a rank, as the caller has checked.
        let code = unsafe {
            (self.nccl.broadcast)(place, place, count, kind, root as c_int, communicator, STREAM)
        };
        self.nccl.check("ncclBroadcast", code)
    }

    /// Enqueues a gather of as many elements from each rank.
    pub(super) fn all_gather(&self, own: &Tensor, all: &mut Tensor) -> Result<(), String> {
        let communicator = self.raw()?;
        let (kind, size) = transport(own.kind());
        let count = own.numel() * size;
        // SAFETY: `all` has room for `count` of every rank, as the caller has made it; both are
        // held while the caller waits. The communicator lives.
        let code = unsafe {
            let (from, to) = (own.data_ptr(), all.data_ptr());
            (self.nccl.all_gather)(from, to, count, kind, communicator, STREAM)
        };
        self.nccl.check("ncclAllGather", code)
    }

    /// Enqueues a gather of `counts[rank]` elements from each rank, as one group of broadcasts.
    pub(super) fn all_gather_varying(
        &self,
        own: &Tensor,
        own_rank: usize,
        counts: &[usize],
        all: &mut Tensor,
    ) -> Result<(), String> {
        let communicator = self.raw()?;
        let (kind, size) = transport(own.kind());
        let bytes = own.kind().elt_size_in_bytes();
        // SAFETY: it takes nothing.
        self.nccl.check("ncclGroupStart", unsafe { (self.nccl.group_start)() })?;
        let (mut sent, mut start) = (Ok(()), 0);
        for (root, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            // SAFETY: the counts of all ranks fill `all`, as the caller has made it.
            let to = unsafe { all.data_ptr().byte_add(start * bytes) };
            let from = if root == own_rank { own.data_ptr() } else { to };
            // SAFETY: `from` holds `count` elements on the root, `to` has room for them on every
            // rank; both tensors are held while the caller waits. The communicator lives.
            let code = unsafe {
                let (count, root) = (count * size, root as c_int);
                (self.nccl.broadcast)(from, to, count, kind, root, communicator, STREAM)
            };
            sent = sent.and_then(|()| self.nccl.check("ncclBroadcast", code));
            start += count;
        }
        // SAFETY: it takes nothing; the group was started above.
        let ended = self.nccl.check("ncclGroupEnd", unsafe { (self.nccl.group_end)() });
        sent.and(ended)
    }
}

/// NCCL's number of a kind of element; none where it has none.
pub(super) fn datatype(kind: Kind) -> Option<c_int> {
    match kind {
        Kind::Int64 => Some(4),
        Kind::Half => Some(6),
        Kind::Float => Some(7),
        Kind::Double => Some(8),
        Kind::BFloat16 => Some(9),
        _ => None,
    }
}

/// How elements that are only moved travel: as what, and as how many of those each.
fn transport(kind: Kind) -> (c_int, usize) {
    datatype(kind).map_or((BYTES, kind.elt_size_in_bytes()), |code| (code, 1))
}
