// Lets the program find libtorch; link arguments of a dependency do not reach its dependents.
fn main() {
    let libtorch = std::env::var("DEP_TORCH_EXT_LIBTORCH_LIB").expect("libtorch's folder");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{libtorch}");
}
