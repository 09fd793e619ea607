//! Files that must never be half written or readable by others.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// A file or directory that could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{action} {path}: {source}", path = path.display())]
pub struct FileError {
    pub action: &'static str,
    pub path: PathBuf,
    pub source: std::io::Error,
}

impl FileError {
    pub(crate) fn new(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { action, path, source }
    }
}

/// Creates a directory (and its parents) that only its owner can enter.
pub fn private_dir(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(FileError::new("can't create directory", path))
}

/// Writes a whole file or nothing: temporary file, fsync, rename, fsync of the directory.
pub fn write_atomic(path: &Path, contents: &[u8], mode: u32) -> Result<(), FileError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        FileError { action: "can't write", path: path.to_owned(), source }
    })
}

/// Reads a file with a secret. As ssh does with its keys, one that belongs to this user and that others may read is
/// refused: whoever could read it may have.
pub fn read_secret(path: &Path, max: u64) -> Result<Zeroizing<String>, FileError> {
    let metadata = fs::metadata(path).map_err(FileError::new("can't read", path))?;
    let mode = metadata.mode() & 0o777;
    if metadata.uid() == nix::unistd::geteuid().as_raw() && mode & 0o077 != 0 {
        let text = format!(
            "others may read it (mode {mode:04o}): `chmod 600 {}`, and make a new key if they may have",
            path.display()
        );
        return Err(FileError {
            action: "won't use",
            path: path.to_owned(),
            source: std::io::Error::other(text),
        });
    }
    let bytes = Zeroizing::new(read(path, max)?);
    let text = std::str::from_utf8(&bytes).map_err(|e| FileError {
        action: "can't read",
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, e),
    })?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// Reads a file of at most `max` bytes.
pub fn read(path: &Path, max: u64) -> Result<Vec<u8>, FileError> {
    let size = fs::metadata(path).map_err(FileError::new("can't read", path))?.len();
    if size > max {
        let source = std::io::Error::other(format!("{size} bytes, at most {max} expected"));
        return Err(FileError { action: "can't read", path: path.to_owned(), source });
    }
    fs::read(path).map_err(FileError::new("can't read", path))
}
