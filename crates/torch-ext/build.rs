//! Compiles `csrc/torch_ext.cpp` against the libtorch that torch-sys found, and hands that
//! libtorch's folder on to dependent packages (see `rpath.rs`).

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=csrc/torch_ext.cpp");
    println!("cargo::rerun-if-env-changed=LIBTORCH_INCLUDE");
    // torch-sys has `links = "tch"`, so its metadata arrives under that name.
    let lib = PathBuf::from(
        env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys did not say where libtorch is"),
    );
    let libtorch_cpu = lib.join("libtorch_cpu.so");
    println!("cargo::rerun-if-changed={}", libtorch_cpu.display());
    assert!(
        libtorch_cpu.exists(),
        "no libtorch_cpu.so in {}: run `cargo xtask setup`",
        lib.display()
    );
    let root = env::var("LIBTORCH_INCLUDE")
        .map(PathBuf::from)
        .unwrap_or_else(|_| lib.parent().expect("the library folder has a parent").to_path_buf());
    let include = root.join("include");
    assert!(
        include.join("ATen/ATen.h").exists(),
        "no ATen/ATen.h in {}: run `cargo xtask setup`",
        include.display()
    );
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .pic(true)
        // Debug information of torch's headers would only bloat the archive.
        .debug(false)
        .file("csrc/torch_ext.cpp")
        // Warnings are wanted for this file, not for torch's headers.
        .flag("-isystem")
        .flag(include.display().to_string())
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").display().to_string())
        .flag_if_supported("-Wall")
        // Without it `at::parallel_for`, a template of the header, is a plain loop.
        .flag("-fopenmp")
        .compile("torch_ext");
    // The one that libtorch has loaded: its threads are shared.
    println!("cargo::rustc-link-lib=gomp");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo::metadata=libtorch_lib={}", lib.display());
}
