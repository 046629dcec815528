//! What one writes to name an image in a registry: `docker://host:port/repository:tag@digest`, with Docker's defaults.

use std::fmt;

use super::{ImageError, oci::Digest};

/// Where Docker Hub's registry answers.
const DOCKER_HUB: &str = "registry-1.docker.io";
/// The name that it goes by.
const DOCKER_HUB_NAME: &str = "docker.io";

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The registry, as in a reference: `host` or `host:port`.
    pub(super) registry: String,
    /// `library/debian`
    pub(super) repository: String,
    pub(super) tag: String,
    /// Wins over the tag.
    pub(super) digest: Option<Digest>,
}

impl Reference {
    pub(super) fn parse(text: &str) -> Result<Self, ImageError> {
        let refused = |problem: &str| ImageError::invalid(&format!("\"{text}\""), problem);
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (rest, None),
        };
        let (rest, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, tag),
            _ => (rest, "latest"),
        };
        let (registry, repository) = match rest.split_once('/') {
            Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host, path.to_owned()),
            Some(_) => (DOCKER_HUB_NAME, rest.to_owned()),
            None => (DOCKER_HUB_NAME, format!("library/{rest}")),
        };
        let part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c))
        };
        if repository.len() > 255 || !repository.split('/').all(part) {
            return Err(refused(
                "is neither a file nor a directory nor an image in a registry, which is written [HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]",
            ));
        }
        let tag_is_fine = (1..=128).contains(&tag.len())
            && !tag.starts_with(['.', '-'])
            && tag.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if !tag_is_fine {
            return Err(refused("has a tag that is not 1 to 128 letters, digits, '.', '_' and '-'"));
        }
        let host_is_fine = |c: char| c.is_ascii_alphanumeric() || ".-:[]".contains(c);
        if !registry.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[') || !registry.chars().all(host_is_fine)
        {
            return Err(refused("has a registry that is no HOST or HOST:PORT"));
        }
        Ok(Self { registry: registry.to_owned(), repository, tag: tag.to_owned(), digest })
    }

    /// The registry's address. Without TLS on this machine only, as with Docker.
    pub(super) fn base(&self) -> String {
        let host = if self.registry == DOCKER_HUB_NAME { DOCKER_HUB } else { &self.registry };
        format!("{}://{host}", if self.is_loopback() { "http" } else { "https" })
    }

    pub(super) fn is_loopback(&self) -> bool {
        let host = self.registry.rsplit_once(':').map_or(self.registry.as_str(), |(host, _)| host);
        host == "localhost"
            || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// The keys under which `docker login` may have put what it was told.
    pub(super) fn credential_keys(&self) -> Vec<String> {
        let hub = (self.registry == DOCKER_HUB_NAME).then(|| "https://index.docker.io/v1/".to_owned());
        let host = &self.registry;
        hub.into_iter().chain([host.clone(), format!("https://{host}"), format!("http://{host}")]).collect()
    }

    /// What to ask the registry for.
    pub(super) fn wanted(&self) -> String {
        self.digest.as_ref().map_or_else(|| self.tag.clone(), ToString::to_string)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.registry, self.repository, self.tag)?;
        self.digest.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_have_dockers_defaults() {
        let full = |text: &str| Reference::parse(text).map(|reference| (reference.to_string(), reference.base()));
        let is = |text: &str, full_name: &str, base: &str| {
            assert_eq!(full(text).expect("parses"), (full_name.to_owned(), base.to_owned()));
        };
        is("debian", "docker.io/library/debian:latest", "https://registry-1.docker.io");
        is("docker://me/app:1.0", "docker.io/me/app:1.0", "https://registry-1.docker.io");
        is("ghcr.io/a/b/c:x", "ghcr.io/a/b/c:x", "https://ghcr.io");
        is("localhost:5000/app", "localhost:5000/app:latest", "http://localhost:5000");
        is("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest", "http://127.0.0.1:5000");
        let digest = format!("sha256:{}", "a".repeat(64));
        is(
            &format!("debian:12@{digest}"),
            &format!("docker.io/library/debian:12@{digest}"),
            "https://registry-1.docker.io",
        );
        for wrong in ["", "/no/such/file", "A", "a//b", "a:b c", "a@sha256:1", "x.y?/a", "http://x.y/a", "../a"] {
            assert!(Reference::parse(wrong).is_err(), "{wrong}");
        }
    }
}
