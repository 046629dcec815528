//! The key that jobs' secrets are sealed with: by the scheduler before they are stored, and opened by the vmhost that runs the job.
//!
//! ```text
//!   sealed value = version │ nonce │ ChaCha20-Poly1305(value), with job and name as associated data
//!                  1 byte    12      length of the value + 16
//! ```
//! The nonce is an HMAC of job, name and value, so the same secret of the same job is sealed to the same bytes: a submission that
//! is repeated is the same submission. A nonce comes twice only with the same text, which tells nothing but that.
//!
//! It must not know how jobs are stored. No value is in a message or a `Debug` output.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use blixard::id::JobId;
use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf, hmac,
    rand::{SecureRandom, SystemRandom},
};

/// Shortest key, in bytes.
pub const MIN_KEY_BYTES: usize = 32;
/// Longest key file that is read: who names another file by mistake is told so.
const MAX_KEY_BYTES: u64 = 64 * 1024;
/// Says how a value is sealed.
const VERSION: u8 = 1;

/// Seals and opens secrets.
#[derive(Clone)]
pub struct SecretKey {
    cipher: std::sync::Arc<LessSafeKey>,
    nonces: hmac::Key,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file can't be read, or made.
    #[error("storage.secret_key_file: cannot use {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others could read it.
    #[error("storage.secret_key_file: {} has mode {mode:04o}: it must be readable by its owner alone (chmod 600)", path.display())]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is no key.
    #[error("storage.secret_key_file: {} has {found} bytes: {MIN_KEY_BYTES} to {MAX_KEY_BYTES} are needed", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
}

/// A sealed value that does not open: another key, another job or name, or damage. Which of them can't be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it was sealed with another key, for another job or name, or is damaged")]
pub struct OpenError;

impl SecretKey {
    /// Reads the key from a file that its owner alone may read; `None` when there is no such file.
    ///
    /// # Errors
    /// There is one, and it can't be used.
    pub fn load(path: &Path) -> Result<Option<Self>, KeyError> {
        let failed = |source| KeyError::Io { path: path.to_owned(), source };
        let file = match fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let metadata = file.metadata().map_err(failed)?;
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Readable { path: path.to_owned(), mode });
        }
        let length = KeyError::Length { path: path.to_owned(), found: metadata.len() };
        if metadata.len() > MAX_KEY_BYTES {
            return Err(length);
        }
        let mut bytes = Vec::new();
        file.take(MAX_KEY_BYTES).read_to_end(&mut bytes).map_err(failed)?;
        Self::from_bytes(&bytes).ok_or(length).map(Some)
    }

    /// The same; a file that is not there is made, with random bytes.
    ///
    /// # Errors
    /// It can't be used, or made.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Io { path: path.to_owned(), source };
        if let Some(key) = Self::load(path)? {
            return Ok(key);
        }
        create(path).map_err(failed)?;
        Self::load(path)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
    }

    /// A key made of these bytes; `None` when they are too few.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < MIN_KEY_BYTES {
            return None;
        }
        let material = hkdf::Salt::new(hkdf::HKDF_SHA256, b"blixard job secrets").extract(bytes);
        let cipher = UnboundKey::from(material.expand(&[b"seal"], &CHACHA20_POLY1305).ok()?);
        let nonces = hmac::Key::from(material.expand(&[b"nonce"], hmac::HMAC_SHA256).ok()?);
        Some(Self { cipher: std::sync::Arc::new(LessSafeKey::new(cipher)), nonces })
    }

    /// Seals the secret `name` of a job. The same again gives the same bytes.
    #[must_use]
    pub fn seal(&self, job: JobId, name: &str, value: &str) -> Vec<u8> {
        let mut context = hmac::Context::with_key(&self.nonces);
        let owner = owner(job, name);
        context.update(&owner);
        context.update(value.as_bytes());
        let tag = context.sign();
        let mut nonce = [0; NONCE_LEN];
        nonce.copy_from_slice(&tag.as_ref()[..NONCE_LEN]);
        let mut text = value.as_bytes().to_vec();
        let sealed =
            self.cipher.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(owner), &mut text);
        // Refused for texts of 256 GiB and more only: then there is nothing that would open.
        if sealed.is_err() {
            text.clear();
        }
        [&[VERSION][..], &nonce, &text].concat()
    }

    /// Opens what [`seal`](Self::seal) made for the same job and name.
    ///
    /// # Errors
    /// It was made otherwise.
    pub fn open(&self, job: JobId, name: &str, sealed: &[u8]) -> Result<String, OpenError> {
        let (&VERSION, rest) = sealed.split_first().ok_or(OpenError)? else { return Err(OpenError) };
        let (nonce, text) = rest.split_at_checked(NONCE_LEN).ok_or(OpenError)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| OpenError)?;
        let mut text = text.to_vec();
        let value = self.cipher.open_in_place(nonce, Aad::from(owner(job, name)), &mut text).map_err(|_| OpenError)?;
        String::from_utf8(value.to_vec()).map_err(|_| OpenError)
    }
}

/// A job's id has a fixed length, so no other pair reads the same.
fn owner(job: JobId, name: &str) -> Vec<u8> {
    [job.0.as_bytes(), name.as_bytes(), b"\0"].concat()
}

/// Writes a key beside its place, and links it there unless another process was faster.
fn create(path: &Path) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let mut bytes = [0; MIN_KEY_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("the kernel gives no random bytes"))?;
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    let linked = match fs::hard_link(&beside, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    fs::remove_file(&beside)?;
    linked
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(…)")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]
mod tests {
    use super::*;

    fn key(byte: u8) -> SecretKey {
        SecretKey::from_bytes(&[byte; MIN_KEY_BYTES]).unwrap()
    }

    #[test]
    fn what_was_sealed_for_a_job_opens_for_it_and_the_same_gives_the_same_bytes() {
        let job = JobId::random();
        let sealed = key(1).seal(job, "TOKEN", "hunter2");
        assert_eq!(key(1).open(job, "TOKEN", &sealed), Ok("hunter2".to_owned()));
        assert_eq!(key(1).seal(job, "TOKEN", "hunter2"), sealed);
        assert!(!sealed.windows(7).any(|window| window == b"hunter2"));
        for other in [key(1).seal(job, "TOKEN", "hunter3"), key(1).seal(JobId::random(), "TOKEN", "hunter2")] {
            assert_ne!(other[1..=NONCE_LEN], sealed[1..=NONCE_LEN], "no nonce comes twice");
        }
        assert_eq!(key(1).open(job, "A", &key(1).seal(job, "A", "")), Ok(String::new()));
    }

    #[test]
    fn another_key_job_or_name_and_any_damage_are_noticed() {
        let job = JobId::random();
        let sealed = key(1).seal(job, "TOKEN", "hunter2");
        assert_eq!(key(2).open(job, "TOKEN", &sealed), Err(OpenError));
        assert_eq!(key(1).open(JobId::random(), "TOKEN", &sealed), Err(OpenError));
        assert_eq!(key(1).open(job, "TOKEN2", &sealed), Err(OpenError));
        for bit in 0..sealed.len() * 8 {
            let mut damaged = sealed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(key(1).open(job, "TOKEN", &damaged), Err(OpenError), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert_eq!(key(1).open(job, "TOKEN", &sealed[..length]), Err(OpenError), "{length} bytes");
        }
    }

    #[test]
    fn a_key_file_is_made_once_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data/secrets.key");
        assert!(SecretKey::load(&path).unwrap().is_none());
        let job = JobId::random();
        let sealed = SecretKey::load_or_create(&path).unwrap().seal(job, "A", "value");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
        assert_eq!(SecretKey::load_or_create(&path).unwrap().open(job, "A", &sealed), Ok("value".to_owned()));
        assert_eq!(SecretKey::load(&path).unwrap().unwrap().open(job, "A", &sealed), Ok("value".to_owned()));
    }

    #[test]
    fn a_key_that_others_can_read_or_that_is_too_short_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, [7; MIN_KEY_BYTES]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = SecretKey::load(&path).unwrap_err().to_string();
        assert!(error.contains("key has mode 0640"), "{error}");
        fs::write(&path, [7; MIN_KEY_BYTES - 1]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let error = SecretKey::load_or_create(&path).unwrap_err().to_string();
        assert!(error.contains("key has 31 bytes"), "{error}");
        assert_eq!(format!("{:?}", key(7)), "SecretKey(…)");
    }
}
