//! The ring in shared memory: every byte of it, and nothing else.
//!
//! ```
//! file offset
//! 0        ┌─────────────────────────────────────────────┐
//!          │ Header: magic, sizes, uuid, … version last  │  one page; each word that is written
//!          │ +128 head  +256 tail  +384 doorbell  +512 …│  at run time has 128 bytes of its own
//! 4096     ├─────────────────────────────────────────────┤
//!          │ StateWord × 1024                            │  8 bytes each
//! 12288    ├─────────────────────────────────────────────┤
//!          │ ProducerRow × 1024                          │  128 bytes each
//! 143360   ├─────────────────────────────────────────────┤
//!          │ Slot × 1024                                 │  4096 bytes each, page-aligned
//! 4337664  └─────────────────────────────────────────────┘
//! ```
//!
//! A place in the ring is a 64-bit *position* that never wraps: slot index = position mod 1024, lap =
//! position div 1024. An operation takes a *span* of 1..256 consecutive slots; the first slot starts with a
//! SlotHeader, the payload follows it and fills the span without holes. Spans never cross the end of the
//! ring: a padding span fills up.
//!
//! Only the state word of a span's *first* slot ever leaves {lap, free}; the interior words stay free until
//! the release. So the length of a damaged span can always be had again: it ends at the next word that is
//! not free, or at the head.

const std = @import("std");
const assert = std.debug.assert;
const checksum = @import("checksum.zig");
const shared = @import("shared.zig");

pub const magic: u64 = std.mem.readInt(u64, "ELGRING\x00", .little);
pub const version: u32 = 1;

/// ring_model.zig has a smaller one, all of whose states can be walked through.
pub const slot_count: u32 = if (@hasDecl(@import("root"), "ring_slot_count")) @import("root").ring_slot_count else 1024;
pub const slot_size: u32 = 4096;
pub const slot_header_size: u32 = 64;
pub const span_slots_max: u32 = slot_count / 4;
pub const producer_rows: u32 = 1024;
pub const cache_line_pair: u32 = 128;

/// The longest payload of one operation: a quarter of the ring, less the header.
pub const payload_bytes_max: u32 = span_slots_max * slot_size - slot_header_size;

pub const state_words_offset: usize = 4096;
pub const producer_rows_offset: usize = state_words_offset + slot_count * @sizeOf(u64);
pub const slots_offset: usize = std.mem.alignForward(usize, producer_rows_offset + producer_rows * @sizeOf(ProducerRow), slot_size);
pub const file_size: usize = slots_offset + @as(usize, slot_count) * slot_size;

/// The run-time words stand 128 bytes apart so that no two of them share a cache line (or the pair of lines
/// that x86 fetches together).
pub const Header = extern struct {
    magic: u64,
    slot_count: u32,
    slot_size: u32,
    uuid: [16]u8,
    producer_rows: u32,
    owner_uid: u32,
    created_realtime_ns: u64,
    reserved_0: [8]u8,
    /// Written last, with release: who reads `version` with acquire sees all that stands above it.
    version: u32,
    reserved_1: [128 - 60]u8,
    /// Position of the next claim. May stand behind (owner claimed, died before moving it): whoever finds it
    /// so moves it on.
    head: u64 align(cache_line_pair),
    /// All positions below are released or left behind. Written by the daemon only; the daemon trusts its own copy.
    tail: u64 align(cache_line_pair),
    /// Futex. 1: the worker sleeps and wants to be woken. 0: it is awake.
    doorbell: u32 align(cache_line_pair),
    /// Futex. Moves with every release while `space_waiters` is not zero.
    space_sequence: u32 align(cache_line_pair),
    /// Producers that wait for space. A hint: one that died while waiting costs a needless wake.
    space_waiters: u32 align(cache_line_pair),
    /// Waits that ended by their time limit although what they waited for had come (late wakes).
    late_wakes: u64 align(cache_line_pair),
};

/// What one slot's state word says. The states and who may change them:
///
/// ```
///   free ──claim (producer, CAS)──▶ claimed ──commit (owner, CAS)──▶ committed ──release (daemon)──▶ free, lap+1
///    │                               │    │                            ▲
///    │                               │    └─pass (daemon)─▶ passed ────┘ commit (owner): committed_passed
///    │                               └─abort (daemon, owner proven dead; or the owner itself)─▶ aborted ─▶ free, lap+1
///    └──pad (producer, CAS)──▶ padding ──release──▶ free, lap+1
/// ```
pub const State = enum(u4) {
    free = 0,
    claimed = 1,
    /// Claimed, and the worker has gone on behind it.
    passed = 2,
    committed = 3,
    /// Committed after the worker had passed it: its owner waits for this slot's release, not for a position.
    committed_passed = 4,
    padding = 5,
    /// Given up: nothing in it counts.
    aborted = 6,
    _,
};

/// **Spans that are left behind.** Spans are released in order, so one that cannot be released (its owner is stopped
/// in the middle of a claim; the log refuses it) would hold up the ring once that has come round. Where it does, the
/// daemon lets the tail go on without it and leaves its words as they are. Whoever finds a word of an *earlier* lap at
/// the head moves the head past that span, and pads up to it where it stands in the way of a longer one. When the span
/// is done at last, its words become {lap, free} of the lap *behind* the next one in which the head comes there: a
/// word of a *later* lap at the head is passed slot by slot. So no two producers can disagree about whether a slot may
/// be claimed in a lap, whatever they saw of its change: in that lap it may not.
pub const StateWord = packed struct(u64) {
    state: State,
    /// Slots of this span, 1..256; 0 where state is free.
    span: u9,
    /// Row of the producer table that claimed it.
    owner: u11,
    lap: u40,

    pub fn free(lap: u40) StateWord {
        return .{ .state = .free, .span = 0, .owner = 0, .lap = lap };
    }

    pub fn with(word: StateWord, state: State) StateWord {
        var changed = word;
        changed.state = state;
        return changed;
    }

    pub fn bits(word: StateWord) u64 {
        return @bitCast(word);
    }
};

/// One attached thread. `mutex` is a robust, process-shared pthread mutex that the thread holds while it is
/// attached: when the thread is gone, by whatever way, the kernel sets FUTEX_OWNER_DIED in its first word.
pub const ProducerRow = extern struct {
    mutex: [64]u8 align(8),
    /// What the owner is at: position + 1 of its open claim, else 0. For the owner itself (a claim that a
    /// signal handler jumped out of) and for people; the daemon does not rely on it.
    open_claim: u64,
    thread_id: u32,
    reserved_0: u32,
    /// The session that the row is lent to; 0: taken back. Written by the daemon only: at attach_thread, and
    /// with 0 (before it reads the head) when the session ends and, in all rows, when a daemon starts. The owner
    /// looks here after each claim: if the value has changed, what it is about to commit would name a handle
    /// that nobody knows any more, so it aborts the claim and attaches anew. A claim that still saw the old
    /// value stands below the head that the daemon then reads.
    session: u64,
    reserved: [128 - 88]u8,
};

/// What `ProducerRow.session` holds while a row is lent: both sides compute it, so that a row that was taken back
/// (0), or lent by another daemon to a session of the same number, is known at sight.
pub fn lease(daemon_epoch: u64, session: u64) u64 {
    return @max(1, daemon_epoch +% session);
}

/// FUTEX_OWNER_DIED and FUTEX_TID_MASK of linux/futex.h, as they stand in the first word of `mutex`.
pub const mutex_owner_died: u32 = 0x4000_0000;
pub const mutex_thread_id_mask: u32 = 0x3fff_ffff;

pub const Operation = enum(u16) {
    /// payload at `offset` of the file.
    write = 1,
    /// payload at the end of the file, which the worker resolves.
    append = 2,
    /// fsync: all that stands before it is durable and visible when its position is published.
    barrier = 3,
    /// ftruncate to `offset`.
    truncate = 4,
    /// fallocate(mode = argument, offset, length = argument_2).
    allocate = 5,
    _,
};

pub const barrier_look: u32 = 1;

/// The first 64 bytes of a span. `header_checksum` covers bytes 4..56 (not the daemon's own words at the end).
pub const SlotHeader = extern struct {
    header_checksum: u32,
    /// CRC32C of the payload; the same value goes into the log.
    payload_checksum: u32,
    length_bytes: u32,
    operation: u16,
    flags: u16,
    /// This span's own position: a slot replayed from an older lap does not fit.
    position: u64,
    /// The file, by the random id under which the log knows it (see wal.zig). Never reused, and it outlives
    /// the daemon: a restarted one finds the file of a pending operation by it.
    file_id: u64,
    /// write: file offset. truncate: new size. allocate: offset. append: 0.
    offset: u64,
    /// The client's registration (index into Positions.handles); errors are reported to it.
    handle: u32,
    /// allocate: mode. barrier: `barrier_look` where it is for a look at the file, which needs nothing durable. Else 0.
    argument: u32,
    /// CLOCK_MONOTONIC at the claim, nanoseconds. allocate: length in bytes.
    time_ns: u64,
    /// Written by the daemon before it applies an append that is not in the log yet: if it is killed in
    /// between, the next daemon writes to the same place again, not behind it.
    resolved_offset: u64,

    pub fn computeChecksum(header: *const SlotHeader) u32 {
        return checksum.crc32c(0, std.mem.asBytes(header)[4..56]);
    }
};

/// How an offset is kept in `SlotHeader.resolved_offset`: shifted past the low 16 bits, which hold a check of
/// offset and position, so that zero (fresh) and leftovers of earlier laps do not pass for an offset.
pub const Resolved = struct {
    pub const offset_max: u64 = (1 << 48) - 1;

    pub fn encode(position: u64, offset: u64) u64 {
        assert(offset <= offset_max);
        return offset << 16 | check(position, offset);
    }

    pub fn decode(position: u64, word: u64) ?u64 {
        const offset = word >> 16;
        return if (word & 0xffff == check(position, offset)) offset else null;
    }

    fn check(position: u64, offset: u64) u64 {
        var bytes: [16]u8 = undefined;
        std.mem.writeInt(u64, bytes[0..8], position, .little);
        std.mem.writeInt(u64, bytes[8..16], offset, .little);
        // Never zero: a fresh slot's zero word must not decode.
        return (checksum.crc32c(0x0e19a7e, &bytes) & 0xffff) | 1;
    }
};

pub fn slotIndex(position: u64) u32 {
    return @intCast(position % slot_count);
}

pub fn lapOf(position: u64) u40 {
    return @intCast(position / slot_count);
}

/// Slots that an operation with this payload takes.
pub fn spanForLength(length_bytes: u32) u32 {
    assert(length_bytes <= payload_bytes_max);
    return (slot_header_size + length_bytes + slot_size - 1) / slot_size;
}

/// The ring as mapped memory. Both sides see it through this; neither reads past what it says.
pub const View = struct {
    memory: []align(std.heap.page_size_min) u8,

    pub fn header(view: View) *Header {
        return @ptrCast(view.memory.ptr);
    }

    pub fn stateWord(view: View, position: u64) *u64 {
        const words: [*]u64 = @ptrCast(@alignCast(view.memory.ptr + state_words_offset));
        return &words[slotIndex(position)];
    }

    pub fn loadState(view: View, position: u64) StateWord {
        return @bitCast(shared.load(u64, view.stateWord(position), .acquire));
    }

    pub fn producerRow(view: View, row: u32) *ProducerRow {
        assert(row < producer_rows);
        const rows: [*]ProducerRow = @ptrCast(@alignCast(view.memory.ptr + producer_rows_offset));
        return &rows[row];
    }

    pub fn slotHeader(view: View, position: u64) *SlotHeader {
        return @ptrCast(@alignCast(view.memory.ptr + slots_offset + @as(usize, slotIndex(position)) * slot_size));
    }

    /// Payload memory of a span of `span` slots that starts at `position`.
    pub fn payload(view: View, position: u64, span: u32) []u8 {
        assert(span >= 1 and span <= span_slots_max);
        assert(slotIndex(position) + span <= slot_count);
        const start = slots_offset + @as(usize, slotIndex(position)) * slot_size;
        return view.memory[start + slot_header_size .. start + @as(usize, span) * slot_size];
    }
};

comptime {
    assert(std.math.isPowerOfTwo(slot_count));
    assert(@sizeOf(SlotHeader) == slot_header_size);
    assert(@offsetOf(SlotHeader, "resolved_offset") == 56);
    assert(@sizeOf(ProducerRow) == 128);
    assert(@offsetOf(ProducerRow, "session") == 80);
    assert(producer_rows <= std.math.maxInt(u11) + 1);
    assert(span_slots_max <= std.math.maxInt(u9));
    assert(@offsetOf(Header, "version") == 56);
    assert(@offsetOf(Header, "head") == 128);
    assert(@offsetOf(Header, "tail") == 256);
    assert(@offsetOf(Header, "doorbell") == 384);
    assert(@offsetOf(Header, "space_sequence") == 512);
    assert(@offsetOf(Header, "space_waiters") == 640);
    assert(@offsetOf(Header, "late_wakes") == 768);
    assert(@sizeOf(Header) <= state_words_offset);
    assert(slots_offset % 4096 == 0);
    if (slot_count == 1024) {
        assert(producer_rows_offset == 12288);
        assert(slots_offset == 143360);
        assert(file_size == 143360 + 4 * 1024 * 1024);
    }
}

test "a span of every payload length fits, and none is longer than it must be" {
    try std.testing.expectEqual(@as(u32, 1), spanForLength(0));
    try std.testing.expectEqual(@as(u32, 1), spanForLength(4032));
    try std.testing.expectEqual(@as(u32, 2), spanForLength(4033));
    try std.testing.expectEqual(span_slots_max, spanForLength(payload_bytes_max));
}
