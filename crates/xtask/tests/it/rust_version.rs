//! What the manifests promise about the compiler.

use std::process::Command;

use serde_json::Value;

/// The numbers of `1.85` or `1.85.0`.
fn version(text: &str) -> Vec<u64> {
    let mut numbers: Vec<u64> = text.split('.').map(|part| part.parse().unwrap()).collect();
    numbers.resize(3, 0);
    numbers
}

#[test]
fn rust_version_is_the_highest_among_the_dependencies() {
    // Asked at run time: a build folder may be shared by several checkouts.
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR").unwrap();
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(manifest_dir)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let told = |ours: bool| {
        packages.iter().filter(move |package| package["source"].is_null() == ours).filter_map(
            |package| Some((package["rust_version"].as_str()?, package["name"].as_str()?)),
        )
    };
    let highest = told(false).max_by_key(|(rust, _)| version(rust)).unwrap();
    for (rust, name) in told(true) {
        assert_eq!(
            version(rust),
            version(highest.0),
            "{name} says rust-version {rust}; the highest among the dependencies is {highest:?}"
        );
    }
    assert!(told(true).count() > 10, "every package of the workspace says its rust-version");
}

#[test]
fn the_pages_for_newcomers_name_it() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let asked = format!("Rust {} or later", env!("CARGO_PKG_RUST_VERSION"));
    for page in ["README.md", "slurm/README.md"] {
        let text = std::fs::read_to_string(format!("{root}/{page}")).unwrap();
        assert!(text.contains(&asked), "{page} does not say `{asked}`");
    }
}
