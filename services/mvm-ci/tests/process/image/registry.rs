//! A registry over loopback, as far as pulling needs one, which wants a bearer token or a name and a password.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::oci::Image;

/// What it wants to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wants {
    Token,
    Password,
}

pub(crate) const USER: &str = "me";
pub(crate) const PASSWORD: &str = "se:cret";

pub(crate) struct Registry {
    /// `127.0.0.1:port`
    pub(crate) address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

struct Shared {
    address: String,
    wants: Wants,
    /// Bodies by path.
    answers: BTreeMap<String, Vec<u8>>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Registry {
    /// Serves `team/app:1` until the test's process ends.
    pub(crate) fn serve(image: &Image, wants: Wants) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address").to_string();
        let mut answers = BTreeMap::new();
        for (digest, bytes) in &image.blobs {
            answers.insert(format!("/v2/team/app/blobs/{digest}"), bytes.clone());
            answers.insert(format!("/v2/team/app/manifests/{digest}"), bytes.clone());
        }
        // By its tag there is an index, with an image for another machine and an attestation in it.
        let mut index = image.index();
        let foreign = |os: &str, architecture: &str| {
            serde_json::json!({"digest": format!("sha256:{}", "0".repeat(64)), "size": 1,
                "platform": {"os": os, "architecture": architecture}})
        };
        let manifests = index["manifests"].as_array_mut().expect("manifests");
        manifests[0]["platform"] = serde_json::json!({"os": "linux", "architecture": "amd64"});
        manifests.extend([foreign("linux", "s390x"), foreign("unknown", "unknown")]);
        answers.insert("/v2/team/app/manifests/1".into(), index.to_string().into_bytes());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::new(Shared { address: address.clone(), wants, answers, requests: requests.clone() });
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || answer(client, &shared));
            }
        });
        Self { address, requests }
    }

    /// Path and query of every request so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("not poisoned").clone()
    }
}

fn answer(client: TcpStream, shared: &Shared) -> Option<()> {
    let mut lines = BufReader::new(client.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut authorization = String::new();
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("authorization")
        {
            value.clone_into(&mut authorization);
        }
    }
    shared.requests.lock().ok()?.push(path.clone());
    let basic = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
    let (challenge, wanted) = match shared.wants {
        Wants::Token => {
            let challenge = format!("Bearer realm=\"http://{}/token\",service=\"test\"", shared.address);
            (challenge, "Bearer t0ken".to_owned())
        }
        Wants::Password => ("Basic realm=\"test\"".to_owned(), basic),
    };
    let (status, header, body) = if path.starts_with("/token?") {
        ("200 OK", String::new(), br#"{"token":"t0ken"}"#.to_vec())
    } else if authorization != wanted {
        ("401 Unauthorized", format!("WWW-Authenticate: {challenge}\r\n"), vec![])
    } else {
        match shared.answers.get(&path) {
            Some(body) => ("200 OK", String::new(), body.clone()),
            None => ("404 Not Found", String::new(), vec![]),
        }
    };
    let mut client = client;
    write!(client, "HTTP/1.1 {status}\r\n{header}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len()).ok()?;
    client.write_all(&body).ok()
}
