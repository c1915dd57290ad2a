//! What the NVIDIA driver knows of GPUs: `libcuda`, loaded while the program runs, so that it is
//! needed neither to build nor to run without a GPU.

use std::ffi::{OsStr, c_char, c_int, c_uint, c_void};
use std::ptr;

use libloading::{Library, Symbol};

/// Name of the driver's library on Linux.
pub(crate) const LIBRARY: &str = "libcuda.so.1";

/// What the driver calls success.
const SUCCESS: c_int = 0;

/// What it says while work is under way.
const NOT_READY: c_int = 600;

type Init = unsafe extern "C" fn(c_uint) -> c_int;
type GetCount = unsafe extern "C" fn(*mut c_int) -> c_int;
type Get = unsafe extern "C" fn(*mut c_int, c_int) -> c_int;
type RetainContext = unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int;
type SetContext = unsafe extern "C" fn(*mut c_void) -> c_int;
type QueryStream = unsafe extern "C" fn(*mut c_void) -> c_int;
type GetUuid = unsafe extern "C" fn(*mut [c_char; 16], c_int) -> c_int;

/// A context of the driver by its address: a number may be moved to another thread.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context(usize);

/// The driver, ready to be asked.
#[derive(Debug)]
pub(crate) struct Driver {
    library: Library,
}

impl Driver {
    /// Loads and initialises the driver; the message of an error says what is missing.
    pub(crate) fn load(library: impl AsRef<OsStr>) -> Result<Self, String> {
        // SAFETY: the library is the system's own driver, whose initialisers libtorch runs as well.
        let library = unsafe { Library::new(library.as_ref()) }.map_err(first_line)?;
        let driver = Self { library };
        // SAFETY: the name and type are those of cuda.h.
        let init: Symbol<'_, Init> =
            unsafe { driver.library.get(b"cuInit") }.map_err(first_line)?;
        // SAFETY: any thread may call it, any number of times; the flags must be 0.
        check("cuInit", unsafe { init(0) })?;
        Ok(driver)
    }

    /// Number of GPUs that this process may use.
    pub(crate) fn count(&self) -> Result<usize, String> {
        let mut count = 0;
        // SAFETY: the name and type are those of cuda.h.
        let get: Symbol<'_, GetCount> =
            unsafe { self.library.get(b"cuDeviceGetCount") }.map_err(first_line)?;
        // SAFETY: the driver is initialised, and there is room for one int.
        check("cuDeviceGetCount", unsafe { get(&mut count) })?;
        usize::try_from(count).map_err(|error| error.to_string())
    }

    fn device(&self, ordinal: usize) -> Result<c_int, String> {
        let ordinal = c_int::try_from(ordinal).map_err(|error| error.to_string())?;
        let mut device = 0;
        // SAFETY: the name and type are those of cuda.h.
        let get: Symbol<'_, Get> =
            unsafe { self.library.get(b"cuDeviceGet") }.map_err(first_line)?;
        // SAFETY: the driver is initialised, and there is room for one int.
        check("cuDeviceGet", unsafe { get(&mut device, ordinal) })?;
        Ok(device)
    }

    /// The context of a GPU that libtorch uses too. It is never given back, as libtorch's is not.
    pub(crate) fn context(&self, ordinal: usize) -> Result<Context, String> {
        let (device, mut context) = (self.device(ordinal)?, ptr::null_mut());
        // SAFETY: the name and type are those of cuda.h.
        let retain: Symbol<'_, RetainContext> =
            unsafe { self.library.get(b"cuDevicePrimaryCtxRetain") }.map_err(first_line)?;
        // SAFETY: a device that the driver has just given, and room for one pointer.
        check("cuDevicePrimaryCtxRetain", unsafe { retain(&mut context, device) })?;
        Ok(Context(context.expose_provenance()))
    }

    /// Makes a context's GPU the one of this thread.
    pub(crate) fn make_current(&self, context: Context) -> Result<(), String> {
        // SAFETY: the name and type are those of cuda.h.
        let set: Symbol<'_, SetContext> =
            unsafe { self.library.get(b"cuCtxSetCurrent") }.map_err(first_line)?;
        let context = ptr::with_exposed_provenance_mut(context.0);
        // SAFETY: a context that the driver has given, and that is never given back.
        check("cuCtxSetCurrent", unsafe { set(context) })
    }

    /// Whether the null stream of this thread's GPU has no more work.
    pub(crate) fn is_idle(&self) -> Result<bool, String> {
        // SAFETY: the name and type are those of cuda.h.
        let query: Symbol<'_, QueryStream> =
            unsafe { self.library.get(b"cuStreamQuery") }.map_err(first_line)?;
        // SAFETY: the null stream is there in every context.
        match unsafe { query(ptr::null_mut()) } {
            NOT_READY => Ok(false),
            code => check("cuStreamQuery", code).map(|()| true),
        }
    }

    /// The bytes that name a GPU, or a part of one where it is split (MIG), on its machine.
    pub(crate) fn uuid(&self, ordinal: usize) -> Result<[u8; 16], String> {
        let (device, mut uuid) = (self.device(ordinal)?, [0; 16]);
        // SAFETY: the names and the type, which is that of both, are those of cuda.h. The first
        // knows parts of GPUs, and drivers before 11.4 do not have it.
        let get_uuid: Symbol<'_, GetUuid> = unsafe {
            self.library
                .get(b"cuDeviceGetUuid_v2")
                .or_else(|_| self.library.get(b"cuDeviceGetUuid"))
        }
        .map_err(first_line)?;
        // SAFETY: a device that the driver has just given, and room for 16 bytes.
        check("cuDeviceGetUuid", unsafe { get_uuid(&mut uuid, device) })?;
        Ok(uuid.map(|byte| byte.cast_unsigned()))
    }
}

fn check(function: &str, code: c_int) -> Result<(), String> {
    if code == SUCCESS { Ok(()) } else { Err(format!("{function} gives CUDA error {code}")) }
}

fn first_line(error: libloading::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;

    use tempfile::TempDir;

    use super::*;

    /// Not CUDA: a library with the driver's function names that knows two made-up GPUs.
    const STAND_IN: &str = r#"
        static int ready;
        int cuInit(unsigned flags) { ready = flags == 0 && !FAILS; return ready ? 0 : 100; }
        int cuDeviceGetCount(int *count) { *count = 2; return ready ? 0 : 3; }
        int cuDeviceGet(int *device, int ordinal) {
            *device = 40 + ordinal;
            return ordinal < 0 || ordinal > 1 ? 101 : 0;
        }
        int UUID(char *uuid, int device) {
            for (int i = 0; i < 16; i++) uuid[i] = (char)(device + i * 13);
            return ready ? 0 : 3;
        }
    "#;

    fn stand_in(uuid: &str, fails: &str) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("cuda.c"), folder.path().join("libcuda.so"));
        std::fs::write(&source, STAND_IN).unwrap();
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", &format!("-DUUID={uuid}"), &format!("-DFAILS={fails}")])
            .arg(&source)
            .arg("-o")
            .arg(&library)
            .status()
            .unwrap();
        assert!(status.success());
        (folder, library)
    }

    #[test]
    fn gpus_are_named_by_the_driver_of_either_age() {
        for function in ["cuDeviceGetUuid", "cuDeviceGetUuid_v2"] {
            let (_folder, library) = stand_in(function, "0");
            let driver = Driver::load(&library).unwrap();
            assert_eq!(driver.count().unwrap(), 2);
            for ordinal in [0, 1] {
                let want: Vec<u8> = (0..16).map(|i| 40 + ordinal as u8 + i * 13).collect();
                assert_eq!(driver.uuid(ordinal).unwrap().to_vec(), want);
            }
            assert_eq!(driver.uuid(2).unwrap_err(), "cuDeviceGet gives CUDA error 101");
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let missing = Driver::load("/nonexistent/libcuda.so.1").unwrap_err();
        assert!(missing.contains("libcuda.so.1"), "{missing}");
        let (_folder, library) = stand_in("cuDeviceGetUuid", "1");
        assert_eq!(Driver::load(&library).unwrap_err(), "cuInit gives CUDA error 100");
        let (_folder, library) = stand_in("cuSomethingElse", "0");
        let error = Driver::load(&library).unwrap().uuid(0).unwrap_err();
        assert!(error.contains("cuDeviceGetUuid"), "{error}");
    }
}
