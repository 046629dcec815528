//! The client that users program against.
