//! Build script of every package that links libtorch (`build = "../torch-ext/rpath.rs"`): its
//! programs and tests find libtorch without an environment variable. Cargo applies link arguments
//! only to the package that prints them, so each package runs this script itself.

#![allow(clippy::print_stdout, reason = "a build script speaks to cargo through stdout")]

use std::{env, path::Path};

pub(crate) fn main() {
    // Any such line keeps cargo from running this again whenever a file of the package changes.
    println!("cargo::rerun-if-env-changed=DEP_TORCH_EXT_LIBTORCH_LIB");
    let lib = env::var("DEP_TORCH_EXT_LIBTORCH_LIB")
        .expect("the package must depend on dromedary-torch-ext directly");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    // The linker drops libraries no symbol of which is used, but libtorch_cuda registers its
    // kernels when it is loaded: without this a CUDA build sees no device.
    if Path::new(&lib).join("libtorch_cuda.so").exists() {
        println!("cargo::rustc-link-arg=-Wl,--no-as-needed,-ltorch_cuda,--as-needed");
    }
}
