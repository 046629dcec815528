//! What is not there, to those for whom that is as good as having deleted it, or as its being empty.

use std::io;

/// The extension of a directory that is being deleted: another may begin in its place meanwhile.
pub(crate) const DELETED: &str = "deleted";

/// The result of deleting or reading something that another may delete at any time.
pub(crate) fn gone<T: Default>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}
