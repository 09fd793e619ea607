//! Compiles the wire definitions with a pure-Rust compiler, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "tombolo/v1/config.proto",
        "tombolo/v1/join.proto",
        "tombolo/v1/federation.proto",
        "tombolo/v1/admin.proto",
        "tombolo/v1/stream.proto",
        "tombolo/v1/workload.proto",
        "spiffe/workload.proto",
    ];
    println!("cargo:rerun-if-changed=tombolo");
    println!("cargo:rerun-if-changed=spiffe");
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
