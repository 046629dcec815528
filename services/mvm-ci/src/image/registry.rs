//! Fetches an image from a registry (distribution-spec 1.1) into a directory, which then is an OCI layout.
//!
//! A registry that wants to know who asks is answered with a bearer token, or with name and password; both come from what
//! `docker login` left in `~/.docker/config.json`, without the helpers that it can call. Public images need neither.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use backon::{ExponentialBuilder, Retryable as _};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use reqwest::{Client, Response, StatusCode, Url, header};
use serde::Deserialize;

use super::{
    ImageError, Phase, Told,
    blobs::verify,
    oci::{self, Descriptor, Digest, Hasher, Index, MAX_DOCUMENT_BYTES},
    reference::Reference,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two pieces of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// After the first attempt.
const RETRIES: usize = 3;
/// All blobs, packed.
const MAX_BYTES: u64 = super::layer::MAX_UNPACKED_BYTES;
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// Fetches the image for this machine.
///
/// # Errors
/// The registry does not have it, does not let us, or sends something else.
pub(super) async fn pull(reference: &Reference, dir: &Path, told: Told<'_>) -> Result<(), ImageError> {
    let mut registry = Registry::new(reference)?;
    fs::create_dir_all(dir.join("blobs/sha256")).map_err(|error| ImageError::io(dir.display(), error))?;
    let mut wanted = Wanted::Named(reference.wanted());
    // An index, and the manifest in it.
    for _ in 0..2 {
        let (descriptor, bytes) = registry.manifest(&wanted).await?;
        let digest = Digest::parse(&descriptor.digest)?;
        store(dir, &digest.path(), &bytes)?;
        match oci::parse(&descriptor.digest, &bytes)? {
            oci::Document::Index(index) => wanted = Wanted::Described(oci::choose(&index, None)?.clone()),
            oci::Document::Manifest(manifest) => {
                registry.blobs(dir, &manifest, told).await?;
                let index = Index { schema_version: 2, manifests: vec![descriptor] };
                let text = serde_json::to_vec(&index).map_err(|error| ImageError::io("index.json", error.into()))?;
                return store(dir, "index.json", &text);
            }
        }
    }
    Err(ImageError::invalid(&reference.to_string(), "is an index of indexes"))
}

fn store(dir: &Path, path: &str, bytes: &[u8]) -> Result<(), ImageError> {
    fs::write(dir.join(path), bytes).map_err(|error| ImageError::io(dir.join(path).display(), error))
}

/// Which manifest.
enum Wanted {
    /// By tag or digest.
    Named(String),
    /// As an index has it.
    Described(Descriptor),
}

/// What the registry wants to see of us.
#[derive(Debug, Clone)]
enum Authorization {
    Basic(Login),
    Bearer(String),
}

/// A name and a password.
#[derive(Clone)]
struct Login {
    user: String,
    password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

struct Registry<'a> {
    client: Client,
    reference: &'a Reference,
    login: Option<Login>,
    authorization: Option<Authorization>,
}

impl<'a> Registry<'a> {
    fn new(reference: &'a Reference) -> Result<Self, ImageError> {
        let client = Client::builder()
            .user_agent(concat!("mvm-ci/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|error| failed(&reference.base(), &error))?;
        let login = docker_config().and_then(|path| login(&path, &reference.credential_keys()));
        Ok(Self { client, reference, login, authorization: None })
    }

    async fn manifest(&mut self, wanted: &Wanted) -> Result<(Descriptor, Vec<u8>), ImageError> {
        let name = match wanted {
            Wanted::Named(name) => name.clone(),
            Wanted::Described(descriptor) => descriptor.digest.clone(),
        };
        let url = format!("{}/v2/{}/manifests/{name}", self.reference.base(), self.reference.repository);
        let mut response = self.get(&url).await?;
        let mut bytes = Vec::new();
        while let Some(part) = response.chunk().await.map_err(|error| failed(&url, &error))? {
            bytes.extend_from_slice(&part);
            if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
                return Err(ImageError::TooLarge {
                    what: "a manifest",
                    allowed: format!("{MAX_DOCUMENT_BYTES} bytes"),
                });
            }
        }
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        match (wanted, &self.reference.digest) {
            (Wanted::Described(asked), _) => {
                verify(&asked.digest, (&Digest::parse(&asked.digest)?, asked.size), (&digest, size))?;
            }
            (Wanted::Named(_), Some(asked)) => verify(&asked.to_string(), (asked, size), (&digest, size))?,
            (Wanted::Named(_), None) => {}
        }
        let descriptor = Descriptor {
            media_type: String::new(),
            digest: digest.to_string(),
            size,
            platform: None,
            annotations: Default::default(),
        };
        Ok((descriptor, bytes))
    }

    async fn blobs(&mut self, dir: &Path, manifest: &oci::Manifest, told: Told<'_>) -> Result<(), ImageError> {
        let all: Vec<&Descriptor> = std::iter::once(&manifest.config).chain(&manifest.layers).collect();
        let total = all.iter().fold(0_u64, |sum, blob| sum.saturating_add(blob.size));
        if total > MAX_BYTES {
            return Err(ImageError::TooLarge { what: "the packed image", allowed: format!("{MAX_BYTES} bytes") });
        }
        let mut done = 0;
        for descriptor in all {
            let digest = Digest::parse(&descriptor.digest)?;
            let path = dir.join(digest.path());
            // An image may have the same layer twice.
            if !path.exists() {
                let part = path.with_extension("part");
                self.blob(descriptor, &digest, &part, &mut |bytes| told(Phase::Download, done + bytes, total)).await?;
                fs::rename(&part, &path).map_err(|error| ImageError::io(path.display(), error))?;
            }
            done += descriptor.size;
        }
        Ok(())
    }

    /// Fetches a blob, from the start again when the connection breaks.
    async fn blob(
        &mut self,
        descriptor: &Descriptor,
        digest: &Digest,
        path: &Path,
        told: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), ImageError> {
        let url = format!("{}/v2/{}/blobs/{digest}", self.reference.base(), self.reference.repository);
        let mut left = RETRIES;
        loop {
            match self.try_blob(&url, descriptor, digest, path, told).await {
                Err(ImageError::Registry { .. }) if left > 0 => left -= 1,
                answer => return answer,
            }
        }
    }

    async fn try_blob(
        &mut self,
        url: &str,
        descriptor: &Descriptor,
        digest: &Digest,
        path: &Path,
        told: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), ImageError> {
        let io = |error| ImageError::io(path.display(), error);
        let mut response = self.get(url).await?;
        let mut file = File::create(path).map_err(io)?;
        let (mut hasher, mut size) = (Hasher::new(), 0);
        while let Some(part) = response.chunk().await.map_err(|error| failed(url, &error))? {
            size += part.len() as u64;
            if size > descriptor.size {
                break;
            }
            hasher.update(&part);
            file.write_all(&part).map_err(io)?;
            told(size);
        }
        verify(&digest.to_string(), (digest, descriptor.size), (&hasher.digest(), size))
    }

    /// Asks, and again with an authorization when the registry wants one.
    async fn get(&mut self, url: &str) -> Result<Response, ImageError> {
        let response = self.send(url).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return answer(url, response);
        }
        let challenges = response.headers().get_all(header::WWW_AUTHENTICATE);
        let challenges: Vec<Challenge> =
            challenges.iter().filter_map(|value| Challenge::parse(value.to_str().ok()?)).collect();
        self.authorization = Some(self.authorize(url, &challenges).await?);
        answer(url, self.send(url).await?)
    }

    async fn send(&self, url: &str) -> Result<Response, ImageError> {
        let ask = || async {
            let request = self.client.get(url).header(header::ACCEPT, ACCEPT);
            // reqwest takes this header away when another host is asked instead, as with blobs that lie elsewhere.
            let request = match &self.authorization {
                Some(Authorization::Basic(login)) => request.basic_auth(&login.user, Some(&login.password)),
                Some(Authorization::Bearer(token)) => request.bearer_auth(token),
                None => request,
            };
            let response = request.send().await?;
            match response.status() {
                StatusCode::TOO_MANY_REQUESTS => response.error_for_status(),
                status if status.is_server_error() => response.error_for_status(),
                _ => Ok(response),
            }
        };
        ask.retry(ExponentialBuilder::default().with_max_times(RETRIES).with_jitter())
            .await
            .map_err(|error| failed(url, &error))
    }

    async fn authorize(&self, url: &str, challenges: &[Challenge]) -> Result<Authorization, ImageError> {
        for challenge in challenges {
            match (challenge, &self.login) {
                (Challenge::Bearer { realm, service }, _) => {
                    return Ok(Authorization::Bearer(self.token(realm, service.as_deref()).await?));
                }
                (Challenge::Basic, Some(login)) => return Ok(Authorization::Basic(login.clone())),
                (Challenge::Basic, None) => {}
            }
        }
        let problem = "it wants a name and a password: docker login, or put them into ~/.docker/config.json";
        Err(ImageError::Registry { what: url.to_owned(), problem: problem.to_owned() })
    }

    /// Asks whom the registry names for a token.
    async fn token(&self, realm: &str, service: Option<&str>) -> Result<String, ImageError> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let refused = |problem: &str| ImageError::Registry { what: realm.to_owned(), problem: problem.to_owned() };
        let mut url = Url::parse(realm).map_err(|error| refused(&error.to_string()))?;
        // Who can read along must not learn a password.
        if url.scheme() != "https" && !(url.scheme() == "http" && self.reference.is_loopback()) {
            return Err(refused("the registry sends us there for a token, and it is not https"));
        }
        let scope = format!("repository:{}:pull", self.reference.repository);
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        let request = self.client.get(url);
        let request = match &self.login {
            Some(login) => request.basic_auth(&login.user, Some(&login.password)),
            None => request,
        };
        let response = request.send().await.map_err(|error| failed(realm, &error))?;
        let token: Token = answer(realm, response)?.json().await.map_err(|error| failed(realm, &error))?;
        token.token.or(token.access_token).ok_or_else(|| refused("it answered without a token"))
    }
}

fn answer(url: &str, response: Response) -> Result<Response, ImageError> {
    let problem = match response.status() {
        status if status.is_success() => return Ok(response),
        StatusCode::NOT_FOUND => "there is no such image".to_owned(),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            "it does not let us: the image may not exist, or docker login with another name".to_owned()
        }
        status => format!("it answered {status}"),
    };
    Err(ImageError::Registry { what: url.to_owned(), problem })
}

/// The causes are the better part of reqwest's errors.
fn failed(url: &str, error: &reqwest::Error) -> ImageError {
    ImageError::Registry { what: url.to_owned(), problem: blixard_chassis::with_causes(error) }
}

/// What a registry wants before it answers.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    /// One `WWW-Authenticate`. The scope in it is not used: we know what we want, and it is to read.
    fn parse(value: &str) -> Option<Self> {
        let (scheme, parameters) = value.trim().split_once(' ').unwrap_or((value.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let parameter = |name: &str| {
            let mut rest = parameters;
            while let Some((key, tail)) = rest.split_once('=') {
                let (value, tail) = match tail.strip_prefix('"') {
                    Some(quoted) => quoted.split_once('"')?,
                    None => tail.split_once(',').unwrap_or((tail, "")),
                };
                if key.trim_matches([' ', ',']).eq_ignore_ascii_case(name) {
                    return Some(value.to_owned());
                }
                rest = tail;
            }
            None
        };
        Some(Self::Bearer { realm: parameter("realm")?, service: parameter("service") })
    }
}

fn docker_config() -> Option<PathBuf> {
    let dir = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let dir = dir.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")))?;
    Some(dir.join("config.json"))
}

/// What `docker login` wrote for one of these keys.
fn login(config: &Path, keys: &[String]) -> Option<Login> {
    let config: serde_json::Value = serde_json::from_slice(&fs::read(config).ok()?).ok()?;
    let encoded = keys.iter().find_map(|key| config["auths"][key]["auth"].as_str())?;
    let decoded = String::from_utf8(BASE64.decode(encoded).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    // Docker pads it so on some systems.
    Some(Login { user: user.to_owned(), password: password.trim_end_matches('\0').to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let value = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let service = Some("registry.docker.io".to_owned());
        let realm = "https://auth.docker.io/token".to_owned();
        assert_eq!(Challenge::parse(value), Some(Challenge::Bearer { realm: realm.clone(), service }));
        let value = "bearer scope=\"x=,y\", realm=https://auth.docker.io/token";
        assert_eq!(Challenge::parse(value), Some(Challenge::Bearer { realm, service: None }));
        assert_eq!(Challenge::parse("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Negotiate"), None);
        assert_eq!(Challenge::parse("Bearer service=\"x"), None);
    }

    #[test]
    fn what_docker_login_wrote_is_found() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("config.json");
        let text = format!(
            r#"{{"auths":{{"ghcr.io":{{"auth":"{}"}},"x.y":{{}}}},"credsStore":"z"}}"#,
            BASE64.encode("me:a:b")
        );
        fs::write(&path, text).expect("writes");
        let found = login(&path, &["docker.io".into(), "ghcr.io".into()]).expect("a login");
        assert_eq!((found.user.as_str(), found.password.as_str()), ("me", "a:b"));
        assert!(login(&path, &["x.y".into()]).is_none());
    }
}
