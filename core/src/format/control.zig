//! Messages on the control socket: a Unix SOCK_SEQPACKET socket, one message per packet, descriptors by
//! SCM_RIGHTS, the peer's identity by SO_PEERCRED. The client asks, the daemon answers each request once, in
//! order. Every message starts with MessageHeader; `length_bytes` must be the packet's own length.
//!
//! ```
//! client                                   daemon
//!   hello          + ring fd         ─▶                   the fd only where the client has a ring already
//!                                    ◀─    welcome       + ring fd, positions fd, routes fd
//!   attach_thread                    ─▶
//!                                    ◀─    thread_attached
//!   register_file  + file fd         ─▶
//!                                    ◀─    file_registered
//!   release_file                     ─▶
//!                                    ◀─    file_released
//!   fence_file                       ─▶
//!                                    ◀─    file_fenced
//!   drain_file     + file fd         ─▶                   the fd may be open for reading only
//!                                    ◀─    file_drained
//!   change_name    + file fd         ─▶                   and its new directory's, where it gets another name; the fds
//!                                    ◀─    name_noted     need not be open for anything
//!   fetch_routes                     ─▶
//!                                    ◀─    routes        + routes fd
//! any request that cannot be served  ◀─    refused
//! ```

const std = @import("std");
const assert = std.debug.assert;

pub const magic: u32 = std.mem.readInt(u32, "ELGC", .little);
pub const version: u16 = 1;
pub const message_bytes_max: u32 = 512;
pub const descriptors_max: u32 = 3;
/// NAME_MAX: one component of a path.
pub const name_bytes_max: u32 = 255;

pub const Kind = enum(u16) {
    hello = 1,
    welcome = 2,
    attach_thread = 3,
    thread_attached = 4,
    register_file = 5,
    file_registered = 6,
    release_file = 7,
    file_released = 8,
    fence_file = 9,
    file_fenced = 10,
    fetch_routes = 11,
    routes = 12,
    refused = 13,
    /// What every process's writes had returned for is in the file when this is answered.
    drain_file = 14,
    file_drained = 15,
    /// Before a name of a file, or of a directory above files, is changed: the log knows of it when this is answered.
    change_name = 16,
    name_noted = 17,
    _,
};

pub const MessageHeader = extern struct {
    magic: u32,
    version: u16,
    kind: u16,
    length_bytes: u32,
    /// Chosen by the client, echoed in the answer.
    sequence: u32,
};

pub const Hello = extern struct {
    header: MessageHeader,
    /// For people: in the peer's own pid namespace, never used to identify.
    process_id: u32,
    ring_version: u32,
    positions_version: u32,
    routes_version: u32,
    /// What the client says it is: "python", "preload", …, zero-padded.
    runtime: [16]u8,
};

pub const Welcome = extern struct {
    header: MessageHeader,
    session: u64,
    ring_uuid: [16]u8,
    ring_bytes: u64,
    positions_bytes: u64,
    routes_bytes: u64,
    daemon_epoch: u64,
    /// 1: it is the test stub, and nothing is durable.
    test_stub: u32,
    reserved: u32,
};

pub const AttachThread = extern struct {
    header: MessageHeader,
    thread_id: u32,
    reserved: u32,
};

pub const ThreadAttached = extern struct {
    header: MessageHeader,
    row: u32,
    reserved: u32,
};

pub const RegisterFile = extern struct {
    header: MessageHeader,
    /// What an earlier daemon called the file: this client's ring may hold something for it by that name. 0: none did.
    former_file_id: u64,
};

pub const FileRegistered = extern struct {
    header: MessageHeader,
    file_id: u64,
    handle: u32,
    route: u32,
};

pub const ReleaseFile = extern struct {
    header: MessageHeader,
    file_id: u64,
    handle: u32,
    reserved: u32,
};

pub const FenceFile = extern struct {
    header: MessageHeader,
    file_id: u64,
    handle: u32,
    /// Why (client.NativeReason), for the daemon's log and counters.
    reason: u32,
};

pub const DrainFile = extern struct {
    header: MessageHeader,
};

pub const NameChange = enum(u32) {
    /// The file, or the directory, gets the name that follows, in the directory of the second descriptor.
    moved = 1,
    /// The file loses its name. (One that keeps it after all is said to move to where it is.)
    removed = 2,
    _,
};

pub const ChangeName = extern struct {
    header: MessageHeader,
    change: NameChange,
    name_length: u32,
    name: [name_bytes_max + 1]u8,
};

pub const FetchRoutes = extern struct {
    header: MessageHeader,
};

/// Answers that carry nothing but success: file_released, file_fenced, file_drained, name_noted.
pub const Done = extern struct {
    header: MessageHeader,
};

pub const Routes = extern struct {
    header: MessageHeader,
    routes_bytes: u64,
};

pub const Refusal = enum(u32) {
    /// Magic, version, length or kind of the message was wrong.
    bad_message = 1,
    version_mismatch = 2,
    /// hello must come first, and once.
    out_of_order = 3,
    not_a_regular_file = 4,
    /// A file with several names cannot be told apart at replay.
    several_links = 5,
    not_open_for_writing = 6,
    not_on_a_route = 7,
    /// The file system takes no user extended attribute.
    no_attribute = 8,
    /// The daemon could not open that inode again with its own rights.
    cannot_reopen = 9,
    /// A table is full: handles, threads, sessions.
    limit_reached = 10,
    unknown_handle = 11,
    log_failed = 12,
    wrong_user = 13,
    stopping = 14,
    /// The file system refused what must be done before a file is taken (marking and syncing it): errno says why.
    target_failed = 15,
    /// A file without a name cannot be found at replay.
    no_name = 16,
    _,
};

pub const Refused = extern struct {
    header: MessageHeader,
    refusal: Refusal,
    /// errno that stands for it, where there is one; else 0.
    errno: i32,
};

comptime {
    assert(@sizeOf(MessageHeader) == 16);
    for (.{ Hello, Welcome, AttachThread, ThreadAttached, RegisterFile, FileRegistered, ReleaseFile, FenceFile, DrainFile, ChangeName, FetchRoutes, Done, Routes, Refused }) |Message| {
        assert(@offsetOf(Message, "header") == 0);
        assert(@sizeOf(Message) <= message_bytes_max);
        assert(@sizeOf(Message) % 8 == 0);
    }
}
