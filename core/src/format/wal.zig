//! The log on disk: every byte of it, and nothing else.
//!
//! A route's log is a directory `<wal dir>/<route>/`. In it: segments `<first LSN, 20 digits>-<timestamp>.wal`
//! (the names are for people, the headers are what counts; one that is prepared and not yet in use is called
//! `spare-…`), a `checkpoint` file, `receipts/` of what was ever lost, `quarantine/`, and `history/`: segments that
//! the checkpoint has passed, kept for people.
//!
//! ```
//! segment                                         group (one commit)
//! 0      ┌──────────────────────────────┐         0    ┌──────────────────────────┐  starts on a fresh 4 KiB
//!        │ SegmentHeader, zero to 4096  │              │ GroupHeader (80)         │  block
//! 4096   ├──────────────────────────────┤         80   ├──────────────────────────┤
//!        │ group                        │              │ RecordHeader (96)        │
//!        ├──────────────────────────────┤              │ payload, zero to 8       │
//!        │ group                        │              ├──────────────────────────┤
//!        ├──────────────────────────────┤              │ RecordHeader …           │
//!        │ zeros, or an older life's    │              ├──────────────────────────┤
//!        │ groups (another segment id)  │              │ zeros to the next 4096   │
//! -4096  ├──────────────────────────────┤              └──────────────────────────┘
//!        │ SegmentHeader as prepared    │
//! size   └──────────────────────────────┘
//! ```
//!
//! The header is written to the first and the last block when the segment is prepared, without a first LSN. When it
//! is put to use the first block is written again, with first LSN, epoch and predecessor, in one write with the
//! first group; the last block then tells whose segment it is, should the first ever be damaged, and every group what
//! the first block said. (Where a start brings the torn tail of an earlier life into a segment, the group goes first,
//! the header follows to both ends.) From a segment's first LSN on, nothing counts that segments of a lower epoch hold.
//!
//! No block that holds acknowledged records is ever written again. The segment id stands in (and under the
//! checksum of) every header, so that what an earlier life of a recycled segment left does not look valid.

const std = @import("std");
const assert = std.debug.assert;
const checksum = @import("checksum.zig");

pub const block_size: u32 = 4096;
/// 2: groups say where they lie, and whose they are; sealed segments say when.
pub const version: u16 = 2;

pub const segment_magic: u64 = std.mem.readInt(u64, "ELGSEGM\x00", .little);
pub const group_magic: u32 = std.mem.readInt(u32, "ELGG", .little);
pub const record_magic: u32 = std.mem.readInt(u32, "ELGR", .little);
pub const checkpoint_magic: u64 = std.mem.readInt(u64, "ELGCHKP\x00", .little);
pub const attribute_magic: u32 = std.mem.readInt(u32, "ELGA", .little);

/// A record's payload is one ring operation's at most.
pub const payload_bytes_max: u32 = 1 << 20;
pub const group_bytes_max: u32 = 4 << 20;

pub const SegmentHeader = extern struct {
    /// CRC32C of bytes 4..128.
    header_checksum: u32,
    version: u16,
    reserved_0: u16,
    magic: u64,
    log_uuid: [16]u8,
    /// Drawn at random for each life of a segment file.
    segment_id: u64,
    /// Of the segment before, or 0.
    predecessor_id: u64,
    /// 0: prepared, and nothing in it counts.
    first_lsn: u64,
    /// A higher epoch wins where LSNs of two segments overlap.
    epoch: u64,
    /// Not 0: sealed, and no record above it counts.
    sealed_lsn: u64,
    size_bytes: u64,
    created_realtime_ns: u64,
    /// When it was sealed; 0 where it is not.
    sealed_realtime_ns: u64,
    reserved_1: [128 - 96]u8,

    pub fn computeChecksum(header: *const SegmentHeader) u32 {
        return checksum.crc32c(0, std.mem.asBytes(header)[4..]);
    }
};

pub const GroupHeader = extern struct {
    /// CRC32C of bytes 4..80.
    header_checksum: u32,
    magic: u32,
    segment_id: u64,
    first_lsn: u64,
    /// The highest LSN known durable when this group was written.
    durable_lsn: u64,
    record_count: u32,
    /// From the start of this header to the end of the last record; the next group starts at the block behind.
    length_bytes: u32,
    written_realtime_ns: u64,
    version: u16,
    reserved_0: u16,
    /// Where in the segment it lies: offset / block_size. Anywhere else it does not count.
    block: u32,
    /// Of its segment, as the segment's header has them: should that be damaged, any group stands in for it. 0: it was
    /// written before the header was, and does not.
    segment_first_lsn: u64,
    segment_epoch: u64,
    reserved_1: [80 - 72]u8,

    pub fn computeChecksum(header: *const GroupHeader) u32 {
        return checksum.crc32c(0, std.mem.asBytes(header)[4..]);
    }
};

pub const Kind = enum(u16) {
    /// Payload goes to `offset` of the file (appends too: the offset is resolved before it is logged).
    write = 1,
    /// New size in `offset`.
    truncate = 2,
    /// fallocate(mode = argument, offset, allocate_bytes in the payload: 8 bytes).
    allocate = 3,
    /// A file came under Elgate's care: payload is a FileIdentity and its path.
    identity = 4,
    /// Nothing before this record is ever replayed to the file.
    fence = 5,
    /// The file may be found under another path as well: payload is the path. It has a name.
    rename = 6,
    /// The file was closed by all, applied and synced: as a fence, and its attribute goes. Who opens it again has its
    /// identity logged behind this.
    released = 8,
    /// The file is losing its last name: where it is not found, nothing of it is missing.
    removed = 9,
    _,
};

pub const RecordHeader = extern struct {
    /// CRC32C of bytes 4..96.
    header_checksum: u32,
    magic: u32,
    segment_id: u64,
    lsn: u64,
    /// Where it stood in which ring (zeros for records of the daemon's own): who replays the ring skips it.
    ring_uuid: [16]u8,
    position: u64,
    file_id: u64,
    offset: u64,
    length_bytes: u32,
    /// The producer's own checksum of the payload.
    payload_checksum: u32,
    kind: u16,
    version: u16,
    argument: u32,
    time_ns: u64,
    reserved: [96 - 88]u8,

    pub fn computeChecksum(header: *const RecordHeader) u32 {
        return checksum.crc32c(0, std.mem.asBytes(header)[4..]);
    }
};

/// `checkpoint`: two blocks of 4096 bytes, written in turn; the valid one with the higher sequence counts.
pub const Checkpoint = extern struct {
    header_checksum: u32,
    version: u16,
    reserved_0: u16,
    magic: u64,
    log_uuid: [16]u8,
    sequence: u64,
    /// Everything up to and including this LSN is durable in its target.
    applied_lsn: u64,
    /// The highest LSN known durable: records at or below it that cannot be read are lost, not torn.
    durable_lsn: u64,
    written_realtime_ns: u64,

    pub fn computeChecksum(header: *const Checkpoint) u32 {
        return checksum.crc32c(0, std.mem.asBytes(header)[4..]);
    }
};

/// Payload of an identity record, followed by `path_length` bytes of the path.
pub const FileIdentity = extern struct {
    inode: u64,
    device: u64,
    /// FS_IOC_GETVERSION, or 0 where the file system has none.
    inode_generation: u32,
    mode: u32,
    uid: u32,
    gid: u32,
    /// statfs f_fsid.
    filesystem_id: u64,
    /// name_to_handle_at, 0 bytes where not to be had.
    kernel_handle_type: i32,
    kernel_handle_length: u32,
    kernel_handle: [128]u8,
    path_length: u32,
    reserved: u32,
};

/// Extended attribute `user.elgate` of a file under Elgate's care. Its presence says: there may be more in
/// the log than in the file.
pub const FileAttribute = extern struct {
    magic: u32,
    version: u32,
    log_uuid: [16]u8,
    file_id: u64,
};

pub const attribute_name = "user.elgate";

/// Bytes that a record with this payload takes in a group.
pub fn recordBytes(length_bytes: u32) u32 {
    return @sizeOf(RecordHeader) + std.mem.alignForward(u32, length_bytes, 8);
}

comptime {
    assert(@sizeOf(SegmentHeader) == 128);
    assert(@sizeOf(GroupHeader) == 80);
    assert(@sizeOf(RecordHeader) == 96);
    assert(@sizeOf(Checkpoint) == 64);
    assert(@sizeOf(FileIdentity) == 184);
    assert(@sizeOf(FileAttribute) == 32);
}
