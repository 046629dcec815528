//! Where log records go: raw bytes to the right descriptor, or JSON lines.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use blixard::pb::common::v1::LogStream;

use super::{args::Format, log_follower::LogRecord, output};

/// Our stdout and stderr without Rust's line buffering: one write per chunk, visible at once, whatever the bytes are.
pub(crate) struct LogSink {
    stdout: File,
    stderr: File,
    format: Format,
}

impl LogSink {
    pub(crate) fn new(format: Format) -> io::Result<Self> {
        Ok(Self {
            stdout: io::stdout().as_fd().try_clone_to_owned()?.into(),
            stderr: io::stderr().as_fd().try_clone_to_owned()?.into(),
            format,
        })
    }

    /// Writes one record. May block for as long as our reader does not read; other tasks go on meanwhile.
    pub(crate) fn write(&mut self, record: &LogRecord) -> io::Result<()> {
        tokio::task::block_in_place(|| match self.format {
            Format::Json => self.line(&record_json(record)),
            Format::Table => self.raw(record),
        })
    }

    /// Writes a line of JSON to stdout.
    pub(crate) fn line(&mut self, value: &serde_json::Value) -> io::Result<()> {
        let mut line = value.to_string();
        line.push('\n');
        self.stdout.write_all(line.as_bytes())
    }

    /// Writes a note for people to stderr.
    pub(crate) fn note(&mut self, text: &str) -> io::Result<()> {
        match self.format {
            Format::Json => Ok(()),
            Format::Table => self.stderr.write_all(format!("mvm-ci: {text}\n").as_bytes()),
        }
    }

    /// Writes bytes of one stream. May block as [`LogSink::write`] does.
    pub(crate) fn bytes(&mut self, stream: LogStream, bytes: &[u8]) -> io::Result<()> {
        tokio::task::block_in_place(|| match stream {
            LogStream::Stderr => self.stderr.write_all(bytes),
            LogStream::Stdout | LogStream::Unspecified => self.stdout.write_all(bytes),
        })
    }

    fn raw(&mut self, record: &LogRecord) -> io::Result<()> {
        match record {
            LogRecord::Chunk { stream: LogStream::Stderr, data, .. } => self.stderr.write_all(data),
            LogRecord::Chunk { data, .. } => self.stdout.write_all(data),
            LogRecord::Gap { from_offset, to_offset, reason, .. } => {
                self.note(&format!("bytes {from_offset} to {to_offset} of the output are gone: {reason}"))
            }
            LogRecord::End { .. } => Ok(()),
        }
    }
}

/// A record as a line of JSON.
pub(crate) fn record_json(record: &LogRecord) -> serde_json::Value {
    match record {
        LogRecord::Chunk { attempt, stream, offset, time, data } => {
            let stream = if *stream == LogStream::Stderr { "stderr" } else { "stdout" };
            let mut line = serde_json::json!({
                "attempt": attempt, "stream": stream, "offset": offset, "time": output::rfc3339(*time),
            });
            match std::str::from_utf8(data) {
                Ok(text) => line["data"] = text.into(),
                Err(_) => line["data_base64"] = STANDARD.encode(data).into(),
            }
            line
        }
        LogRecord::Gap { attempt, from_offset, to_offset, reason } => serde_json::json!({
            "attempt": attempt, "gap": { "from_offset": from_offset, "to_offset": to_offset, "reason": reason },
        }),
        LogRecord::End { attempt, end_offset, state, exit, reason } => serde_json::json!({
            "attempt": attempt,
            "end": {
                "end_offset": end_offset, "state": state.as_str(), "exit": output::exit_json(exit.as_ref()),
                "reason": reason,
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use blixard::{job::JobState, time::Timestamp};

    use super::*;

    #[test]
    fn records_are_json_lines_and_bytes_that_are_no_text_are_base64() {
        let chunk = |stream, data: &'static [u8]| LogRecord::Chunk {
            attempt: 1,
            stream,
            offset: 7,
            time: Timestamp(1_700_000_000_123),
            data: data.into(),
        };
        let records = [
            chunk(LogStream::Stdout, "héllo\n".as_bytes()),
            chunk(LogStream::Stderr, b"\xff\xfe\0"),
            LogRecord::Gap { attempt: 1, from_offset: 10, to_offset: 20, reason: "retention".into() },
            LogRecord::End {
                attempt: 1,
                end_offset: 20,
                state: JobState::Succeeded,
                exit: None,
                reason: String::new(),
            },
        ];
        let lines: Vec<_> = records.iter().map(|record| record_json(record).to_string()).collect();
        insta::assert_snapshot!(lines.join("\n"));
    }
}
