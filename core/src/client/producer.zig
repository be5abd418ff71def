//! Claim, copy, commit: a producer's way into the ring, and nothing else.
//!
//! ```
//!   head ─▶ slot {lap, free} ──CAS──▶ {lap, claimed, owner, span} ──CAS──▶ {lap, committed, …}
//!            │                          then the head moves by the span (whoever finds it behind moves it)
//!            └─ span would cross the ring's end: ──CAS──▶ {lap, padding, span}, then again at the start
//! ```
//!
//! Every function here is lock-free and async-signal-safe. The caller must hold the mutex of its row, and must
//! commit or abort what it has claimed; what it leaves open is aborted by the daemon once the kernel says that
//! the thread is dead.

const std = @import("std");
const assert = std.debug.assert;
const builtin = @import("builtin");
const ring = @import("../format/ring.zig");
const shared = @import("../format/shared.zig");
const positions = @import("../format/positions.zig");
const checksum = @import("../format/checksum.zig");
const system = @import("system.zig");

pub const Claim = struct {
    view: ring.View,
    position: u64,
    word: ring.StateWord,

    pub fn span(open: Claim) u32 {
        return open.word.span;
    }
};

pub const ClaimError = error{
    /// No room for the span, or no credit for the route: wait for space.
    Full,
    /// The ring's words contradict each other: somebody scribbled over it.
    Damaged,
};

/// What a route may still take: at most a quarter of the ring, or three where it is the only one with records in it
/// (so that one whose disk stalls still leaves something to those who come after).
pub const Credit = struct {
    view: positions.View,
    route: u32,

    /// The position that the route may fill the ring up to.
    fn limit(credit: Credit) u64 {
        const header = credit.view.header();
        const is_sole = shared.load(u32, &header.sole_route, .monotonic) == credit.route;
        const slots: u64 = if (is_sole) ring.slot_count / 4 * 3 else ring.slot_count / 4;
        const held = shared.load(u32, &credit.view.route(credit.route).held_slots, .monotonic);
        // Slots that the worker has not seen yet may be this route's.
        return shared.load(u64, &header.scanned, .monotonic) +| (slots -| held);
    }
};

/// Above this a position does not fit its lap's 40 bits.
pub const position_limit: u64 = 1 << 50;

/// Rounds without progress before a ring is called damaged. Progress by others is not counted: only a word that
/// cannot be what it says.
const damage_rounds_max = 1000;

/// Claims `span` slots for `row`. `opening` gets position + 1 before each attempt and 0 where the attempt failed,
/// so that a claim whose owner is jumped away from can be found again.
///
/// `allowed_below`: the position up to which this ring and this credit had room when they were last looked at, or 0.
/// They are looked at again when that is used up: so the words that the worker writes all the time are not read (each
/// read brings a cache line from its processor) with every claim. Room once seen stays: the tail never goes back, and
/// of a credit no more than one can be used up beyond what it would be by now.
pub fn claim(view: ring.View, row: u32, span: u32, credit: ?Credit, opening: *u64, allowed_below: *u64) ClaimError!Claim {
    assert(row < ring.producer_rows);
    assert(span >= 1 and span <= ring.span_slots_max);
    const header = view.header();
    var damage_rounds: u32 = 0;
    // Padding and spans left behind, in this one call: where the whole ring has no gap that is long enough, it is full.
    var passed_slots: u32 = 0;
    while (damage_rounds < damage_rounds_max) {
        const head = shared.load(u64, &header.head, .acquire);
        if (head >= position_limit) return error.Damaged;
        if (passed_slots > ring.slot_count) return error.Full;
        const lap = ring.lapOf(head);
        const room = gap(view, head, @min(span, ring.slot_count - ring.slotIndex(head)), lap);
        const padding = room < span;
        if (!isAllowed(view, credit, head + room, allowed_below)) return error.Full;

        const word = ring.StateWord{
            .state = if (padding) .padding else .claimed,
            .span = @intCast(room),
            .owner = @intCast(row),
            .lap = lap,
        };
        if (!padding) @atomicStore(u64, opening, head + 1, .monotonic);
        const found_bits = shared.exchangeIf(u64, view.stateWord(head), ring.StateWord.free(lap).bits(), word.bits(), .seq_cst, .acquire) orelse {
            moveHead(header, head, room);
            if (!padding) return .{ .view = view, .position = head, .word = word };
            passed_slots += room;
            continue;
        };
        if (!padding) @atomicStore(u64, opening, 0, .monotonic);

        const found: ring.StateWord = @bitCast(found_bits);
        const left = ring.slot_count - ring.slotIndex(head);
        const sound = found.span >= 1 and found.span <= ring.span_slots_max and found.span <= left;
        var step: u32 = 0;
        if (found.lap > lap) {
            // Taken and released since we read the head; or not to be had in this lap (see StateWord).
            if (shared.load(u64, &header.head, .acquire) != head) continue;
            step = 1;
        } else if (found.lap < lap) {
            step = if (found.state != .free and sound) found.span else 1;
        } else switch (found.state) {
            .claimed, .passed, .committed, .committed_passed, .padding, .aborted => {
                if (sound) moveHead(header, head, found.span) else damage_rounds += 1;
                continue;
            },
            .free, _ => {
                damage_rounds += 1;
                continue;
            },
        }
        if (!isAllowed(view, credit, head + step, allowed_below)) return error.Full;
        moveHead(header, head, step);
        passed_slots += step;
    }
    return error.Damaged;
}

fn isAllowed(view: ring.View, credit: ?Credit, end: u64, allowed_below: *u64) bool {
    if (end <= allowed_below.*) return true;
    const room = shared.load(u64, &view.header().tail, .acquire) + ring.slot_count;
    allowed_below.* = if (credit) |its| @min(room, its.limit()) else room;
    return end <= allowed_below.*;
}

/// Slots from the head on that can be claimed together: up to `wanted`, or to the first that is not free in this lap.
/// The first one is looked at by the claim itself. What stands free stays so: nobody claims behind the head, and what
/// is left behind was so before the tail let us come here.
fn gap(view: ring.View, head: u64, wanted: u32, lap: u40) u32 {
    const free = ring.StateWord.free(lap);
    for (1..wanted) |slot| {
        if (view.loadState(head + slot) != free) return @intCast(slot);
    }
    return wanted;
}

/// Only from where the span began: the owner and its helpers may all try, one succeeds.
fn moveHead(header: *ring.Header, from: u64, span: u32) void {
    _ = shared.exchangeIf(u64, &header.head, from, from + span, .seq_cst, .monotonic);
}

/// Where the payload goes: the whole span, as long as the claim is open.
pub fn payload(open: Claim) []u8 {
    return open.view.payload(open.position, open.span());
}

/// Writes the header of an open claim. Its payload is in place already: the checksum is taken from the copy in
/// the ring, so that it says what really stands there, whatever the caller's buffer does meanwhile.
pub fn seal(open: Claim, fields: ring.SlotHeader) void {
    var header = fields;
    header.position = open.position;
    header.resolved_offset = 0;
    header.payload_checksum = checksum.crc32c(0, payload(open)[0..header.length_bytes]);
    header.header_checksum = header.computeChecksum();
    open.view.slotHeader(open.position).* = header;
}

pub const Committed = enum {
    /// Its completion is told by the positions.
    committed,
    /// The worker had gone on behind it: its completion is told by the slot's release alone.
    committed_passed,
    /// The daemon took the owner for dead, or a signal handler gave the claim up: nothing happened.
    aborted,
};

pub fn commit(open: Claim) Committed {
    const word = open.view.stateWord(open.position);
    // seq_cst: the doorbell is looked at after this.
    const found = shared.exchangeIf(u64, word, open.word.bits(), open.word.with(.committed).bits(), .seq_cst, .acquire) orelse return .committed;
    if (found != open.word.with(.passed).bits()) return .aborted;
    if (shared.exchangeIf(u64, word, found, open.word.with(.committed_passed).bits(), .seq_cst, .acquire) == null) return .committed_passed;
    return .aborted;
}

/// Gives up a claim. True if it was still open and this thread's.
pub fn abort(view: ring.View, row: u32, position: u64) bool {
    const word = view.loadState(position);
    if (word.lap != ring.lapOf(position) or word.owner != row) return false;
    if (word.state != .claimed and word.state != .passed) return false;
    if (shared.exchangeIf(u64, view.stateWord(position), word.bits(), word.with(.aborted).bits(), .seq_cst, .acquire)) |changed_bits| {
        const changed: ring.StateWord = @bitCast(changed_bits);
        if (changed != word.with(.passed)) return false;
        return shared.exchangeIf(u64, view.stateWord(position), changed.bits(), changed.with(.aborted).bits(), .seq_cst, .acquire) == null;
    }
    return true;
}

/// The slots of the operation at `position` have been given back: a passed claim is done then.
pub fn isReleased(view: ring.View, position: u64) bool {
    return view.loadState(position).lap != ring.lapOf(position);
}

/// After a commit: has the processor fetch what the next operation will write to, while this thread does something else.
/// The worker had it last.
pub fn fetchAhead(view: ring.View, position: u64) void {
    fetchForWriting(view.stateWord(position));
    const slot: [*]u8 = @ptrCast(view.slotHeader(position));
    inline for (0..fetched_lines) |line| fetchForWriting(slot + line * 64);
}

/// A header and a short payload.
const fetched_lines = 3;

inline fn fetchForWriting(place: anytype) void {
    switch (builtin.cpu.arch) {
        // Processors that do not know it do nothing; the compiler's own would fetch for reading on the oldest that we build for.
        .x86_64 => asm volatile ("prefetchw (%[place])"
            :
            : [place] "r" (place),
        ),
        else => @prefetch(place, .{ .rw = .write }),
    }
}

/// After a commit: wakes the worker if it sleeps. Costs one load where it does not.
pub fn ringDoorbell(view: ring.View) void {
    const doorbell = &view.header().doorbell;
    if (shared.load(u32, doorbell, .seq_cst) != 1) return;
    if (@atomicRmw(u32, doorbell, .Xchg, 0, .seq_cst) == 1) system.futexWake(doorbell, 1, .shared);
}
