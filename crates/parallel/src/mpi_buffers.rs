//! MPI calls on memory, all of whose `unsafe` code is here.

use std::ffi::{c_char, c_int, c_void};
use std::slice;
use std::thread;
use std::time::Duration;

use mpi::ffi;
use tch::{Kind, Tensor};

use crate::communicator::Message;
use crate::{Error, Result, host};

unsafe extern "C" {
    safe fn dromedary_mpi_in_place() -> *mut c_void;
}

/// One call on 64 MiB takes twice as long as calls on 4 to 16 MiB, which also keeps every count
/// far below the 2^31 that MPI can say.
const CHUNK_BYTES: usize = 8 << 20;

/// Tag of messages from one rank to another.
const MESSAGE: c_int = 1;

/// Pause between two looks at a barrier that may take hours.
const LOOK: Duration = Duration::from_millis(5);

/// How elements of several ranks become one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reduction {
    Sum,
    Max,
}

/// An MPI communicator by its Fortran handle: a plain number, which unlike the C handle may be
/// moved to another thread.
///
/// It is never freed: freeing is collective and would wait for a rank that fails.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group(c_int);

impl Group {
    /// All ranks. MPI must be initialised.
    pub(crate) fn world() -> Self {
        // SAFETY: reading a handle that MPI_Init has set up; the conversion is a look-up.
        let group = Self(unsafe { ffi::RSMPI_Comm_c2f(ffi::RSMPI_COMM_WORLD) });
        group.return_errors();
        group
    }

    /// MPI's default ends the process without a word on what was called. Groups made from this one
    /// inherit the setting.
    fn return_errors(self) {
        // SAFETY: a live communicator and one of MPI's own handlers. The call fails only on an
        // invalid handle, and then MPI's default stays.
        unsafe { ffi::MPI_Comm_set_errhandler(self.raw(), ffi::RSMPI_ERRORS_RETURN) };
    }

    fn raw(self) -> ffi::MPI_Comm {
        // SAFETY: the number came from RSMPI_Comm_c2f and the communicator is never freed.
        unsafe { ffi::RSMPI_Comm_f2c(self.0) }
    }

    pub(crate) fn rank(self) -> Result<usize> {
        let mut rank = 0;
        // SAFETY: a live communicator and a place for one int.
        check("rank", unsafe { ffi::MPI_Comm_rank(self.raw(), &mut rank) })?;
        Ok(rank as usize)
    }

    pub(crate) fn size(self) -> Result<usize> {
        let mut size = 0;
        // SAFETY: a live communicator and a place for one int.
        check("size", unsafe { ffi::MPI_Comm_size(self.raw(), &mut size) })?;
        Ok(size as usize)
    }

    pub(crate) fn barrier(self) -> Result<()> {
        // SAFETY: a live communicator.
        check("barrier", unsafe { ffi::MPI_Barrier(self.raw()) })
    }

    /// A barrier that sleeps while it waits; MPI's own keeps a core busy.
    pub(crate) fn patient_barrier(self) -> Result<()> {
        const OPERATION: &str = "wait_for_all";
        // SAFETY: reading MPI's own constant.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: a live communicator and a place for one handle, which outlives the request: the
        // loop below ends when MPI has completed it.
        check(OPERATION, unsafe { ffi::MPI_Ibarrier(self.raw(), &mut request) })?;
        loop {
            let mut done = 0;
            // SAFETY: the request that MPI has just made, a place for one int, and MPI's own
            // constant for a status that nobody reads.
            let code = unsafe { ffi::MPI_Test(&mut request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            check(OPERATION, code)?;
            if done != 0 {
                return Ok(());
            }
            thread::sleep(LOOK);
        }
    }

    /// So short a message is on its way when MPI returns, wherever the receiver is.
    pub(crate) fn send(self, operation: &'static str, to: usize, message: Message) -> Result<()> {
        let (place, count) = (message.as_ptr().cast(), message.len() as c_int);
        // SAFETY: `message` holds `count` numbers for the whole of the call.
        let code = unsafe {
            ffi::MPI_Send(place, count, ffi::RSMPI_UINT64_T, to as c_int, MESSAGE, self.raw())
        };
        check(operation, code)
    }

    /// Whether a message of `from` has arrived.
    pub(crate) fn has_message(self, operation: &'static str, from: usize) -> Result<bool> {
        let mut found = 0;
        // SAFETY: a live communicator, a place for one int, and a status that nobody reads.
        let code = unsafe {
            let ignore = ffi::RSMPI_STATUS_IGNORE;
            ffi::MPI_Iprobe(from as c_int, MESSAGE, self.raw(), &mut found, ignore)
        };
        check(operation, code).map(|()| found != 0)
    }

    /// The next message of `from`; waits for it.
    pub(crate) fn receive(self, operation: &'static str, from: usize) -> Result<Message> {
        let mut message = Message::default();
        let count = message.len() as c_int;
        // SAFETY: `message` has room for `count` numbers, which is what is sent with this tag.
        let code = unsafe {
            let (place, kind) = (message.as_mut_ptr().cast(), ffi::RSMPI_UINT64_T);
            let ignore = ffi::RSMPI_STATUS_IGNORE;
            ffi::MPI_Recv(place, count, kind, from as c_int, MESSAGE, self.raw(), ignore)
        };
        check(operation, code).map(|()| message)
    }

    pub(crate) fn split(self, color: c_int, key: c_int) -> Result<Self> {
        let mut made = self.raw();
        // SAFETY: a live communicator and a place for one handle.
        check("split", unsafe { ffi::MPI_Comm_split(self.raw(), color, key, &mut made) })?;
        // SAFETY: MPI has just made this communicator.
        Ok(Self(unsafe { ffi::RSMPI_Comm_c2f(made) }))
    }

    /// In place on a dense host tensor of a kind that MPI knows.
    pub(crate) fn all_reduce(
        self,
        operation: &'static str,
        tensor: &mut Tensor,
        reduction: Reduction,
    ) -> Result<()> {
        let kind = tensor.f_kind().map_err(Error::torch(operation))?;
        let datatype = datatype(operation, kind)?;
        let element = kind.elt_size_in_bytes();
        // SAFETY: reading MPI's own constants.
        let (sum, max) = unsafe { (ffi::RSMPI_SUM, ffi::RSMPI_MAX) };
        let op = match reduction {
            Reduction::Sum => sum,
            Reduction::Max => max,
        };
        for chunk in bytes_mut(tensor).chunks_mut(CHUNK_BYTES) {
            let count = (chunk.len() / element) as c_int;
            let (in_place, place) = (dromedary_mpi_in_place(), chunk.as_mut_ptr().cast());
            // SAFETY: `place` holds `count` elements of `datatype`, borrowed mutably for the call;
            // a chunk is a whole number of them, since its size is a power of two.
            let code =
                unsafe { ffi::MPI_Allreduce(in_place, place, count, datatype, op, self.raw()) };
            check(operation, code)?;
        }
        Ok(())
    }

    pub(crate) fn broadcast(
        self,
        operation: &'static str,
        bytes: &mut [u8],
        root: usize,
    ) -> Result<()> {
        for chunk in bytes.chunks_mut(CHUNK_BYTES) {
            let count = chunk.len() as c_int;
            // SAFETY: `chunk` holds `count` bytes, borrowed mutably for the call.
            let code = unsafe {
                let place = chunk.as_mut_ptr().cast();
                ffi::MPI_Bcast(place, count, ffi::RSMPI_UINT8_T, root as c_int, self.raw())
            };
            check(operation, code)?;
        }
        Ok(())
    }

    /// A few bytes of every rank, as many from each, in rank order.
    pub(crate) fn all_gather<const N: usize>(
        self,
        operation: &'static str,
        bytes: &[u8; N],
        size: usize,
    ) -> Result<Vec<[u8; N]>> {
        let mut all = vec![[0_u8; N]; size];
        // SAFETY: `bytes` holds N bytes and `all` N for each of the group's `size` ranks.
        let code = unsafe {
            ffi::MPI_Allgather(
                bytes.as_ptr().cast(),
                N as c_int,
                ffi::RSMPI_UINT8_T,
                all.as_mut_ptr().cast(),
                N as c_int,
                ffi::RSMPI_UINT8_T,
                self.raw(),
            )
        };
        check(operation, code).map(|()| all)
    }

    /// `bytes` of every rank behind each other in `all`; rank i brings `lengths[i]`.
    pub(crate) fn all_gather_varying(
        self,
        operation: &'static str,
        bytes: &[u8],
        lengths: &[usize],
        all: &mut [u8],
    ) -> Result<()> {
        assert_eq!(all.len(), lengths.iter().sum::<usize>(), "room for what all ranks bring");
        // Open MPI calls a gather of nothing an invalid argument.
        if all.is_empty() {
            return Ok(());
        }
        if all.len() > CHUNK_BYTES {
            return self.broadcast_each(operation, bytes, lengths, all);
        }
        let counts: Vec<c_int> = lengths.iter().map(|length| *length as c_int).collect();
        let starts: Vec<c_int> = counts
            .iter()
            .scan(0, |end, count| {
                *end += count;
                Some(*end - count)
            })
            .collect();
        // SAFETY: counts and starts have an entry for each rank and stay within `all`, as asserted;
        // nothing is longer than CHUNK_BYTES, so no number was cut.
        let code = unsafe {
            ffi::MPI_Allgatherv(
                bytes.as_ptr().cast(),
                bytes.len() as c_int,
                ffi::RSMPI_UINT8_T,
                all.as_mut_ptr().cast(),
                counts.as_ptr(),
                starts.as_ptr(),
                ffi::RSMPI_UINT8_T,
                self.raw(),
            )
        };
        check(operation, code)
    }

    /// The same in chunks, for what is long.
    fn broadcast_each(
        self,
        operation: &'static str,
        bytes: &[u8],
        lengths: &[usize],
        all: &mut [u8],
    ) -> Result<()> {
        let (own, mut rest) = (self.rank()?, all);
        for (root, length) in lengths.iter().enumerate() {
            let (part, tail) = rest.split_at_mut(*length);
            if root == own {
                part.copy_from_slice(bytes);
            }
            self.broadcast(operation, part, root)?;
            rest = tail;
        }
        Ok(())
    }
}

fn datatype(operation: &'static str, kind: Kind) -> Result<ffi::MPI_Datatype> {
    // SAFETY: reading MPI's own constants.
    unsafe {
        match kind {
            Kind::Float => Ok(ffi::RSMPI_FLOAT),
            Kind::Double => Ok(ffi::RSMPI_DOUBLE),
            Kind::Int64 => Ok(ffi::RSMPI_INT64_T),
            _ => Err(Error::UnsupportedKind { operation, kind }),
        }
    }
}

/// The elements of a dense host tensor.
pub(crate) fn bytes(tensor: &Tensor) -> &[u8] {
    assert!(host::is_dense_host(tensor), "a dense host tensor");
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if length == 0 {
        return &[];
    }
    // SAFETY: a dense host tensor has its elements behind each other at data_ptr, and keeps them
    // while it is borrowed.
    unsafe { slice::from_raw_parts(tensor.data_ptr().cast(), length) }
}

/// The elements of a dense host tensor, to be changed.
pub(crate) fn bytes_mut(tensor: &mut Tensor) -> &mut [u8] {
    assert!(host::is_dense_host(tensor), "a dense host tensor");
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as in `bytes`; no other reference to the elements exists, as this module is the
    // only one that makes them and the tensor is borrowed mutably.
    unsafe { slice::from_raw_parts_mut(tensor.data_ptr().cast(), length) }
}

fn check(operation: &'static str, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0_u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: room for the longest message MPI has.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    let text = &text[..(length as usize).min(text.len())];
    Err(Error::Mpi { operation, message: String::from_utf8_lossy(text).into_owned() })
}

/// Ends all ranks. Returns where MPI is not up.
pub(crate) fn abort(code: c_int) {
    if !mpi::is_initialized() || mpi::environment::is_finalized() {
        return;
    }
    // SAFETY: MPI is up. It may be called from another thread than the one that is in a
    // collective: the state it leaves behind is of no use to anybody.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
}
