use std::process::Command;

use crate::support::checkout;

#[test]
fn the_library_needs_no_libtorch() {
    let tree = |package: &str| {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--offline", "--prefix", "none", "--edges", "normal,build"])
            .args(["--package", package])
            .current_dir(checkout())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let names = |tree: &str| -> Vec<String> {
        tree.lines().filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
    };
    let is_torch = |name: &String| name.contains("torch") || name == "tch";
    let ours = names(&tree("dromedary-prompt-cleaning"));
    assert!(ours.iter().any(|name| name == "polars"), "{ours:?}");
    assert!(!ours.iter().any(is_torch), "{ours:?}");
    // The same look finds it where it is.
    assert!(names(&tree("dromedary-llama")).iter().any(is_torch));
}
