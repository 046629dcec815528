//! Redis Streams with an fsync before each answer: a queue that is known for its speed. A client of our own that speaks just
//! enough RESP.

use std::{net::TcpListener, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

use crate::support::plane::Service;

const STREAM: &str = "jobs";
const GROUP: &str = "workers";

/// A `redis-server` with a consumer group.
pub(crate) struct Redis {
    service: Service,
    port: u16,
}

impl Redis {
    pub(crate) async fn start(directory: &Path) -> anyhow::Result<Self> {
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", ""]);
        command.args(["--appendonly", "yes", "--appendfsync", "always"]);
        let service = Service::start(&mut command, directory, "Ready to accept connections").context("redis-server")?;
        let redis = Self { service, port };
        redis.connect("setup").await?.call(&["XGROUP", "CREATE", STREAM, GROUP, "$", "MKSTREAM"]).await?;
        Ok(redis)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.service.process.id()
    }

    pub(crate) async fn connect(&self, consumer: &str) -> anyhow::Result<Connection> {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream: BufReader::new(stream), consumer: consumer.to_owned() })
    }
}

/// Publishes and consumes.
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
    consumer: String,
}

#[derive(Debug, PartialEq)]
enum Reply {
    Text(String),
    List(Vec<Reply>),
    Nothing,
}

impl Reply {
    fn list(self) -> anyhow::Result<Vec<Reply>> {
        match self {
            Self::List(replies) => Ok(replies),
            other => bail!("a list, not {other:?}"),
        }
    }

    fn text(self) -> anyhow::Result<String> {
        match self {
            Self::Text(text) => Ok(text),
            other => bail!("a text, not {other:?}"),
        }
    }
}

impl Connection {
    /// What a job is to a queue: publish one, consume one, acknowledge that one.
    pub(crate) async fn job(&mut self, payload: &str) -> anyhow::Result<()> {
        self.call(&["XADD", STREAM, "*", "spec", payload]).await?.text()?;
        let consumer = self.consumer.clone();
        let consume = ["XREADGROUP", "GROUP", GROUP, &consumer, "COUNT", "1", "BLOCK", "10000", "STREAMS", STREAM, ">"];
        // [[stream, [[id, fields]]]]
        let mut streams = self.call(&consume).await?.list().context("nothing to consume")?;
        let mut entries = streams.remove(0).list()?.remove(1).list()?;
        let id = entries.remove(0).list()?.remove(0).text()?;
        let acknowledged = self.call(&["XACK", STREAM, GROUP, &id]).await?;
        anyhow::ensure!(acknowledged == Reply::Text("1".to_owned()), "{acknowledged:?}");
        Ok(())
    }

    async fn call(&mut self, words: &[&str]) -> anyhow::Result<Reply> {
        let mut command = format!("*{}\r\n", words.len());
        for word in words {
            command.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.stream.write_all(command.as_bytes()).await?;
        tokio::time::timeout(Duration::from_secs(30), self.reply()).await?
    }

    async fn reply(&mut self) -> anyhow::Result<Reply> {
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        let (kind, rest) = line.trim_end().split_at_checked(1).context("the connection ended")?;
        match kind {
            "+" | ":" => Ok(Reply::Text(rest.to_owned())),
            "-" => bail!("redis: {rest}"),
            // A length of -1: nothing.
            "$" | "*" if rest.starts_with('-') => Ok(Reply::Nothing),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.stream.read_exact(&mut bytes).await?;
                bytes.truncate(bytes.len() - 2);
                Ok(Reply::Text(String::from_utf8(bytes)?))
            }
            "*" => {
                let mut replies = Vec::new();
                for _ in 0..rest.parse::<usize>()? {
                    replies.push(Box::pin(self.reply()).await?);
                }
                Ok(Reply::List(replies))
            }
            other => bail!("not RESP: {other:?}"),
        }
    }
}
