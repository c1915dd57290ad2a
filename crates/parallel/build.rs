//! Compiles the one C file that needs `mpi.h`, and the rpath of `../torch-ext/rpath.rs`.

use std::env;

#[path = "../torch-ext/rpath.rs"]
mod rpath;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=csrc/in_place.c");
    println!("cargo::rerun-if-env-changed=MPICC");
    // The same compiler wrapper that rsmpi asks, so that both see one MPI.
    cc::Build::new()
        .compiler(env::var("MPICC").unwrap_or_else(|_| "mpicc".to_owned()))
        .file("csrc/in_place.c")
        .compile("dromedary_mpi_in_place");
    rpath::main();
}
