//! The rpath of `../torch-ext/rpath.rs`.

#[path = "../torch-ext/rpath.rs"]
mod rpath;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    rpath::main();
}
