//! As much of protoc as prost's builds ask for: `--include_imports --include_source_info -o FILE -I DIR... FILE...`.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use protox::Compiler;

fn main() -> anyhow::Result<()> {
    let mut includes: Vec<PathBuf> = Vec::new();
    let mut files: Vec<PathBuf> = Vec::new();
    let mut output = None;
    let (mut imports, mut sources) = (false, false);
    let mut args = std::env::args_os().skip(1);
    let following =
        |flag: &str, value: Option<OsString>| value.with_context(|| format!("{flag} needs a value"));
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--include_imports") => imports = true,
            Some("--include_source_info") => sources = true,
            Some("-o") => output = Some(following("-o", args.next())?),
            Some("-I") => includes.push(following("-I", args.next())?.into()),
            Some(flag) if flag.starts_with('-') => bail!("{flag} is not known here; protoc may"),
            _ => files.push(arg.into()),
        }
    }
    let output = output.context("-o is missing")?;
    let mut compiler = Compiler::new(includes)?;
    compiler.include_imports(imports).include_source_info(sources);
    compiler.open_files(files)?;
    std::fs::write(output, compiler.encode_file_descriptor_set())?;
    Ok(())
}
