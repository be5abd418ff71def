//! What a routed file does: the semantics that an application sees, operation by operation.
//!
//! Every function returns a count or 0, `native` where the caller must do the operation itself, or -errno. All may
//! be called from any thread, and from a signal handler (which gets -EDEADLK in the rare case that it interrupted
//! this library in its own bookkeeping).
//!
//! An operation goes: look the descriptor up and hold its file (`Use`) → registered with the daemon? → thread has a
//! row? → claim → is all of that still true? → copy → commit → doorbell. Only what follows a fork, a restart of the
//! daemon, or a first use takes a lock or a system call.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const control = @import("../format/control.zig");
const positions = @import("../format/positions.zig");
const ring = @import("../format/ring.zig");
const routes = @import("../format/routes.zig");
const wal = @import("../format/wal.zig");
const descriptors = @import("descriptors.zig");
const path_module = @import("path.zig");
const producer = @import("producer.zig");
const session_module = @import("session.zig");
const system = @import("system.zig");
const thread_module = @import("thread.zig");
const wait = @import("wait.zig");
const Counters = session_module.Counters;
const File = descriptors.File;
const Inode = descriptors.Inode;
const Ring = session_module.Ring;
const Thread = thread_module.Thread;
const Ticket = session_module.Ticket;
const session = &session_module.process;

/// ELGATE_NATIVE.
pub const native: i32 = -4096;

/// Within this file: nobody in this process has the inode open for writing, through whom the daemon could be asked where
/// it is.
const no_writer: i32 = -4098;

/// Within this file: the ring that held the operation has been replaced by another, and nothing more will be known
/// of it. Never returned to a caller: see `reported` and `shown`.
const ring_lost: i32 = -4097;

/// ELGATE_REASON_*.
pub const Reason = enum(u32) {
    mapped = 1,
    direct = 2,
    large_write = 3,
    kernel_copy = 4,
    passed_on = 5,
    linked = 6,
    unsupported = 7,
    unlinked = 8,
    _,
};

/// ELGATE_ACCEPTED and the rest.
pub const Level = enum(i32) { accepted = 0, logged = 1, durable = 2, applied = 3, _ };

/// struct iovec, as the application gives it.
pub const Vector = extern struct {
    base: ?[*]const u8,
    length: usize,
};

/// How large a file may be is known to its file system alone: beyond this the kernel decides. What a target refuses for
/// good would keep the file from everything else.
const file_bytes_max = 1 << 40;
comptime {
    assert(file_bytes_max <= ring.Resolved.offset_max);
}

/// IOV_MAX of the kernel.
pub const vectors_max = 1024;
/// Times an operation starts over because the session changed under it, before it fails.
const restarts_max = 64;
const fallback_reason_offset = 100;
/// How long a file waits for a daemon that is out of descriptors, before it is native.
const short_limit_ns = 2 * std.time.ns_per_s;

/// RLIMIT_FSIZE, as it was at the last open of a routed file. (A limit that is lowered later is met at the next
/// open, not before; programs set it before they start.)
var size_limit: u64 = system.unlimited;
/// Registrations of files that are native for good: kept until the process ends, as long as there are few.
var kept_for_good: u32 = 0;
const kept_for_good_max = 1024;
/// Session in which `registerOthers` has been done.
var others_registered: u32 = 0;
var warned_refusal: bool = false;
var warned_damage: bool = false;
var warned_marked: bool = false;

/// Once per process, before the session starts.
pub fn prepare() error{ OutOfMemory, HeldByThisThread }!void {
    try descriptors.prepare();
    descriptors.on_last_reference = &takeLeave;
    readSizeLimit();
}

pub const listener = session_module.Listener{
    .session_replaced = sessionReplaced,
    .ring_replaced = ringReplaced,
    .forked = descriptors.forgetParent,
    .has_pending = hasPending,
};

fn readSizeLimit() void {
    @atomicStore(u64, &size_limit, system.limit(.FSIZE), .monotonic);
}

// ---- holding a file --------------------------------------------------------------------------------------------

/// An operation in progress on a descriptor. Lives in the frame of the entry point, whose address tells whether
/// the operation can still be running (see thread.zig).
const Use = struct {
    thread: *Thread,
    operation: *thread_module.Operation,
    file: *File,
    fd: i32,
    /// Registers also what is native in this process already: the daemon has to know of the fence.
    fencing: bool = false,

    /// 0, `native`, or -errno. After 0: `end`.
    inline fn begin(use: *Use, fd: i32) i32 {
        if (!descriptors.has(fd)) return native;
        return use.beginRouted(fd);
    }

    fn beginRouted(use: *Use, fd: i32) i32 {
        session.checkFork();
        const thread = thread_module.current(session.fork_epoch);
        const place = @intFromPtr(use);
        while (thread.topDead(place)) |dead| discard(thread, dead);
        const operation = thread.push(place) orelse return system.negative(.DEADLK);
        const file = descriptors.pin(fd) orelse {
            thread.pop(operation);
            return native;
        };
        operation.file = file;
        use.* = .{ .thread = thread, .operation = operation, .file = file, .fd = fd };
        if (file.inode.currentCare() == .leaving) return use.awaitOutcome();
        return 0;
    }

    fn end(use: *Use) void {
        use.thread.pop(use.operation);
        descriptors.unpin(use.file);
    }

    /// Somebody is making the file native, and waits for everybody but those who are parked here.
    fn awaitOutcome(use: *Use) i32 {
        if (use.thread.leaving == use.file.inode) {
            use.end();
            return system.negative(.DEADLK);
        }
        const inode = use.file.inode;
        _ = @atomicRmw(u32, &inode.parked, .Add, 1, .seq_cst);
        while (inode.currentCare() == .leaving) _ = system.sleepNs(100 * std.time.ns_per_us);
        _ = @atomicRmw(u32, &inode.parked, .Sub, 1, .seq_cst);
        return 0;
    }

    fn isNative(use: *const Use) bool {
        return @atomicLoad(bool, &use.file.refused, .monotonic) or use.file.inode.currentCare() == .native;
    }
};

/// An operation whose signal handler jumped out of it: what it had open is given up.
fn discard(thread: *Thread, dead: *thread_module.Operation) void {
    if (dead.opening != 0) {
        _ = producer.abort(thread.ring.?.view, thread.row, dead.opening - 1);
    }
    const file = dead.file;
    thread.pop(dead);
    if (file) |held| descriptors.unpin(held);
}

// ---- registration ----------------------------------------------------------------------------------------------

/// What an operation is sent with. Holds as long as the session's sequence is the one in it.
const Standing = struct {
    sequence: u32,
    ring: *const Ring,
    route: u32,
    handle: u32,
    file_id: u64,
    flags: routes.Flags,
};

/// 0 and the file's standing in the current session; registers it if need be.
fn standingOf(use: *Use, standing: *Standing) i32 {
    const file = use.file;
    for (0..restarts_max) |_| {
        const sequence = session.currentSequence();
        if (@atomicLoad(u32, &file.registered, .acquire) == sequence and sequence != 0) {
            if (session.currentRing()) |current| {
                standing.* = .{
                    .sequence = sequence,
                    .ring = current,
                    .route = @atomicLoad(u32, &file.route, .monotonic),
                    .handle = @atomicLoad(u32, &file.handle, .monotonic),
                    .file_id = @atomicLoad(u64, &file.file_id, .monotonic),
                    .flags = @bitCast(@atomicLoad(u32, @as(*u32, @ptrCast(&file.flags)), .monotonic)),
                };
                if (@atomicLoad(u32, &file.registered, .acquire) == sequence and session.isCurrent(sequence)) return 0;
            }
        }
        const result = register(use);
        if (result != 0) return result;
        registerOthers(use);
    }
    return system.negative(.IO);
}

/// Once in each session: files that the ring still holds something for. Where the daemon has found them no more, that waits
/// for this.
fn registerOthers(use: *const Use) void {
    const sequence = session.currentSequence();
    if (@atomicRmw(u32, &others_registered, .Xchg, sequence, .seq_cst) == sequence) return;
    const current = session.currentRing() orelse return;
    for (0..descriptors.used()) |index| {
        const fd: i32 = @intCast(index);
        const file = descriptors.pin(fd) orelse continue;
        defer descriptors.unpin(file);
        const ticket = file.inode.lastTicket();
        if (ticket == Ticket.none or ticket.ordinal != current.ordinal or producer.isReleased(current.view, ticket.position)) continue;
        if (!@atomicLoad(bool, &file.was_registered, .monotonic) or file.currentMode().observer) continue;
        var other = Use{ .thread = use.thread, .operation = use.operation, .file = file, .fd = fd };
        var standing: Standing = undefined;
        _ = standingOf(&other, &standing); // what is wrong with it, its own next operation says
    }
}

fn register(use: *Use) i32 {
    const file = use.file;
    const inode = file.inode;
    file.registration_lock.acquire() catch return system.negative(.DEADLK);
    defer file.registration_lock.release();
    const began_ns = system.monotonicNs();
    var backoff = session_module.Backoff{};
    var attempts: u32 = 0;
    while (attempts < restarts_max) {
        attempts += 1;
        if (use.isNative() and !use.fencing) return native;
        if (file.currentMode().observer) return native;
        if (file.failed) return system.negative(.IO);
        const sequence = session.currentSequence();
        if (file.registered == sequence and sequence != 0) return 0;
        session.ensureConnected() catch |err| return if (session.currentState() == .passthrough) unserved(use) else errnoOf(err);
        if (!isSameFile(use)) {
            // Closed behind our back, and the number is another's now: none of our business.
            _ = descriptors.remove(file, use.fd);
            return native;
        }
        var refusal: session_module.Refusal = undefined;
        const former_file_id = @atomicLoad(u64, &file.file_id, .monotonic);
        const new = session.registerFile(use.fd, &file.route_name, former_file_id, &refusal) catch |err| switch (err) {
            error.Lost => continue,
            error.Refused => {
                // It drains, and takes no new files; the next one will. It hangs up when it is done: this session may as
                // well be kept until then. Or it is out of descriptors, and will have some in a moment.
                const is_short = refusal.reason == .limit_reached and refusal.errno == @intFromEnum(system.E.AGAIN);
                if (refusal.reason != .stopping and !is_short) return refused(use, refusal);
                const limit_ns = if (is_short) @min(short_limit_ns, session.reconnect_limit_ns) else session.reconnect_limit_ns;
                const deadline_ns = began_ns +| limit_ns;
                if (system.monotonicNs() >= deadline_ns) return if (is_short) refused(use, refusal) else system.negative(.IO);
                if (wait.isEnded(backoff.sleep(deadline_ns))) return system.negative(.INTR);
                attempts -= 1;
                continue;
            },
            error.HeldByThisThread, error.Interrupted => return errnoOf(err),
        };
        const known = @atomicLoad(u64, &inode.registered, .acquire);
        if (known >> 32 == new.sequence and known & 0xffff_ffff != new.route) {
            // One file is in one log. A daemon that says otherwise would have its records out of order.
            return refused(use, .{ .reason = .not_on_a_route, .errno = 0 });
        }
        @atomicStore(u32, &file.registered, 0, .release);
        @atomicStore(u32, &file.handle, new.handle, .monotonic);
        @atomicStore(u64, &file.file_id, new.file_id, .monotonic);
        @atomicStore(u32, &file.route, new.route, .monotonic);
        if (new.flags) |flags| @atomicStore(u32, @as(*u32, @ptrCast(&file.flags)), @bitCast(flags), .monotonic);
        @atomicStore(u32, &file.errors_seen, new.error_baseline, .monotonic);
        @atomicStore(u64, &inode.registered, @as(u64, new.sequence) << 32 | new.route, .release);
        @atomicStore(bool, &file.was_registered, true, .monotonic);
        @atomicStore(u32, &file.registered, new.sequence, .release);
        return 0;
    }
    return system.negative(.IO);
}

/// The daemon is not there for this process, which goes on natively: but never past what a log has for the file.
fn unserved(use: *Use) i32 {
    if (isMarked(use.fd)) {
        warnMarked(use.fd);
        return system.negative(.IO);
    }
    @atomicStore(bool, &use.file.refused, true, .release);
    countFallback(@intFromEnum(control.Refusal.wrong_user));
    return native;
}

fn warnMarked(fd: i32) void {
    var buffer: path_module.Buffer = undefined;
    warnOnce(&warned_marked, "{s} carries the mark of a log (attribute user.elgate), which may hold more than the file does, and its daemon does not serve this process: it is not written past it, and operations on it fail with EIO. More of these are not printed", .{path_module.ofDescriptor(fd, &buffer) orelse "a file"});
}

pub fn errnoOf(err: session_module.Error) i32 {
    return switch (err) {
        error.Lost, error.Refused => system.negative(.IO),
        error.HeldByThisThread => system.negative(.DEADLK),
        error.Interrupted => system.negative(.INTR),
    };
}

fn isSameFile(use: *const Use) bool {
    const status = system.fileStatus(use.fd) orelse return false;
    return status.device == use.file.inode.device and status.inode == use.file.inode.number;
}

fn refused(use: *Use, refusal: session_module.Refusal) i32 {
    const file = use.file;
    const name = session_module.refusalName(refusal);
    const passing = refusal.reason == .limit_reached or refusal.reason == .log_failed;
    // What nobody can open any more, and has all that this process has written, is the business of those who have it open.
    const is_ours_alone = refusal.reason == .no_name and file.inode.isSettled();
    if (@atomicLoad(bool, &file.was_registered, .monotonic) and !is_ours_alone) {
        // There are records of ours in the log: writing beside it would put them out of order.
        if (!passing) file.failed = true;
        warnOnce(&warned_refusal, "the daemon does not take a file of route \"{s}\" back ({s}); operations on it fail with EIO. Its accepted records are safe. Open it again once that is mended", .{ file.route_name.text(), name });
        return system.negative(.IO);
    }
    // What the log has for it, be it from another process, must not be replayed over what would be written beside it.
    if (passing and isMarked(use.fd)) {
        warnOnce(&warned_refusal, "the daemon does not take a file of route \"{s}\" ({s}), and its log may hold more than the file does: operations on it fail until that is mended", .{ file.route_name.text(), name });
        return if (refusal.errno == @intFromEnum(system.E.AGAIN)) system.negative(.IO) else negativeErrno(refusal.errno);
    }
    @atomicStore(bool, &file.refused, true, .release);
    countFallback(@intFromEnum(refusal.reason));
    warnOnce(&warned_refusal, "the daemon does not take a file of route \"{s}\" ({s}); it is written natively, without Elgate's durability. More of these are counted, not printed", .{ file.route_name.text(), name });
    return native;
}

fn warnOnce(warned: *bool, comptime format: []const u8, arguments: anytype) void {
    if (!@atomicRmw(bool, warned, .Xchg, true, .monotonic)) system.warn(format, arguments);
}

fn countFallback(reason: u64) void {
    Counters.add(&session.counters.native_fallbacks, 1);
    @atomicStore(u64, &session.counters.last_fallback_reason, reason, .monotonic);
}

// ---- errors that came later ------------------------------------------------------------------------------------

const Report = enum { peek, consume };

/// An error of an earlier operation that this file has not reported yet: 0 or -errno. `consume`: it counts as
/// reported then, for one of the callers.
fn deferredError(file: *File, report: Report) i32 {
    const losses = @atomicLoad(u32, &file.inode.losses, .seq_cst);
    const losses_seen = @atomicLoad(u32, &file.losses_seen, .monotonic);
    if (losses != losses_seen) {
        if (report == .peek) return system.negative(.IO);
        if (@cmpxchgStrong(u32, &file.losses_seen, losses_seen, losses, .seq_cst, .monotonic) == null) return system.negative(.IO);
    }
    for (0..restarts_max) |_| {
        const sequence = session.currentSequence();
        if (@atomicLoad(u32, &file.registered, .acquire) != sequence or sequence == 0) return 0;
        const view = session.positionsView() orelse return 0;
        const handle = view.handle(@atomicLoad(u32, &file.handle, .monotonic));
        const error_sequence = @atomicLoad(u32, &handle.error_sequence, .acquire);
        const errno = @atomicLoad(i32, &handle.error_errno, .acquire);
        if (!session.isCurrent(sequence)) continue;
        const seen = @atomicLoad(u32, &file.errors_seen, .monotonic);
        if (error_sequence == seen) return 0;
        if (report == .consume) {
            if (@cmpxchgStrong(u32, &file.errors_seen, seen, error_sequence, .seq_cst, .monotonic) != null) return 0;
        }
        return negativeErrno(errno);
    }
    return 0;
}

/// What tells whether there has been another error of this file since.
const Errors = struct { session: u32, sequence: u32, losses: u32 };

fn errorsOf(file: *const File) Errors {
    const registered = @atomicLoad(u32, &file.registered, .acquire);
    const losses = @atomicLoad(u32, &file.inode.losses, .seq_cst);
    const handle = handleOf(file) orelse return .{ .session = registered, .sequence = 0, .losses = losses };
    return .{ .session = registered, .sequence = @atomicLoad(u32, &handle.error_sequence, .acquire), .losses = losses };
}

/// Not 0: the file's target refuses with this errno.
fn failureOf(file: *const File) i32 {
    const handle = handleOf(file) orelse return 0;
    return @atomicLoad(i32, &handle.failed_errno, .acquire);
}

/// In the current session; null: it has none there.
fn handleOf(file: *const File) ?*const positions.HandleState {
    const sequence = session.currentSequence();
    if (sequence == 0 or @atomicLoad(u32, &file.registered, .acquire) != sequence) return null;
    const view = session.positionsView() orelse return null;
    return view.handle(@atomicLoad(u32, &file.handle, .monotonic));
}

/// For a caller that reports errors: the loss of a ring is reported with this.
fn reported(file: *File, result: i32) i32 {
    if (result != ring_lost) return result;
    @atomicStore(u32, &file.losses_seen, @atomicLoad(u32, &file.inode.losses, .seq_cst), .monotonic);
    return system.negative(.IO);
}

/// For a caller that may ignore errors: the next write, fsync or close reports it again.
fn shown(result: i32) i32 {
    return if (result == ring_lost) system.negative(.IO) else result;
}

/// What the daemon published as an errno, whatever it may be.
fn negativeErrno(errno: i32) i32 {
    return if (errno > 0 and errno < 4096) -errno else system.negative(.IO);
}

/// What stands against a new operation: 0, -errno, or `native` where another process has made the file native.
fn objection(use: *Use, request: *const Request, standing: *const Standing) i32 {
    const view = session.positionsView() orelse return 0;
    const handle = view.handle(standing.handle);
    const line = view.route(standing.route);
    // What the route's policy is for when it is full, is answered by that.
    const by_policy = request.may_fail_when_full and isClosed(line);
    const route_errno = if (by_policy) 0 else @atomicLoad(i32, &line.failure_errno, .acquire);
    // A truncate may be what makes room.
    const file_errno = if (request.operation == .truncate) 0 else @atomicLoad(i32, &handle.failed_errno, .acquire);
    const verdict = @atomicLoad(positions.Native, &handle.native, .acquire);
    if (route_errno == 0 and file_errno == 0 and verdict == .routed) return 0;
    if (!session.isCurrent(standing.sequence)) return 0; // not about us; the claim is checked again
    if (verdict != .routed) {
        const awaited = awaitVerdict(standing, &handle.native);
        if (awaited != native) return awaited;
        const result = leave(use, .{ .fenced_elsewhere = {} });
        return if (result == 0) native else result;
    }
    // What a daemon said that is gone does not count: the next one may find that all is well.
    if (session.daemonIsGone(standing.sequence)) {
        session.reconnect(standing.sequence) catch |err| return errnoOf(err);
        return 0;
    }
    return negativeErrno(if (file_errno != 0) file_errno else route_errno);
}

/// While another process's fence is being logged. `native`: it is; 0: it could not be, or there is another session
/// now; -errno.
fn awaitVerdict(standing: *const Standing, verdict: *const positions.Native) i32 {
    var pause_ns: u64 = 50 * std.time.ns_per_us;
    var looked_ns = system.monotonicNs();
    while (true) {
        const seen = @atomicLoad(positions.Native, verdict, .acquire);
        if (!session.isCurrent(standing.sequence)) return 0;
        switch (seen) {
            .routed => return 0,
            .native => return native,
            .undecided, _ => {},
        }
        if (wait.isEnded(system.sleepNs(pause_ns))) return system.negative(.INTR);
        pause_ns = @min(2 * pause_ns, 5 * std.time.ns_per_ms);
        const now_ns = system.monotonicNs();
        if (now_ns - looked_ns < wait.slice_ns) continue;
        looked_ns = now_ns;
        if (session.daemonIsGone(standing.sequence)) {
            session.reconnect(standing.sequence) catch |err| return errnoOf(err);
        }
    }
}

fn verdictOn(standing: *const Standing) positions.Native {
    const view = session.positionsView() orelse return .undecided;
    return @atomicLoad(positions.Native, &view.handle(standing.handle).native, .seq_cst);
}

/// Between two daemons: what the one before had published stays true.
fn sessionReplaced() void {
    descriptors.eachInode({}, struct {
        fn visit(_: void, inode: *Inode) void {
            const ticket = inode.lastTicket();
            const registered = @atomicLoad(u64, &inode.registered, .acquire);
            const current = session.currentRing() orelse return;
            if (ticket == Ticket.none or ticket.ordinal != current.ordinal or registered >> 32 != session.mappedSequence()) return;
            const view = positions.View{ .memory = session.positions_memory.? };
            if (wait.reached(view.route(@truncate(registered)), ticket.position, .{ .applied = true })) inode.noteSettled(ticket);
        }
    }.visit);
}

/// Between two rings: what was accepted in the old one and not durable is beyond this process's knowledge.
fn ringReplaced(old: *const Ring) void {
    descriptors.eachInode(old, struct {
        fn visit(replaced: *const Ring, inode: *Inode) void {
            const ticket = inode.lastTicket();
            if (ticket == Ticket.none or ticket.ordinal != replaced.ordinal) return;
            const registered = @atomicLoad(u64, &inode.registered, .acquire);
            if (registered >> 32 == session.mappedSequence()) {
                const view = positions.View{ .memory = session.positions_memory.? };
                const line = view.route(@truncate(registered));
                if (wait.reached(line, ticket.position, .{ .durable = true })) return;
            }
            inode.noteLoss();
        }
    }.visit);
}

/// Called with the session's lock held.
fn hasPending() bool {
    var pending = false;
    descriptors.eachInode(&pending, struct {
        fn visit(found: *bool, inode: *Inode) void {
            const ticket = inode.lastTicket();
            // A close waits until all is applied.
            if (ticket == Ticket.none or @atomicLoad(u32, &inode.references, .monotonic) == 0) return;
            const registered = @atomicLoad(u64, &inode.registered, .acquire);
            if (registered >> 32 == session.mappedSequence()) {
                const view = positions.View{ .memory = session.positions_memory.? };
                if (wait.reached(view.route(@truncate(registered)), ticket.position, .{ .applied = true })) return;
            }
            found.* = true;
        }
    }.visit);
    return pending;
}

// ---- sending ---------------------------------------------------------------------------------------------------

const Request = struct {
    operation: ring.Operation,
    offset: u64 = 0,
    argument: u32 = 0,
    /// allocate only.
    allocate_bytes: u64 = 0,
    vectors: []const Vector = &.{},
    length_bytes: u32 = 0,
    /// A write: may answer EAGAIN or ENOSPC instead of waiting for space.
    may_fail_when_full: bool = false,
};

/// Puts one operation into the ring. 0 and its ticket; `native` or -errno: then nothing has happened; `ring_lost`.
fn submit(use: *Use, request: *const Request, ticket: *Ticket) i32 {
    const thread = use.thread;
    const span = ring.spanForLength(request.length_bytes);
    for (0..restarts_max) |_| {
        var standing: Standing = undefined;
        const standing_result = standingOf(use, &standing);
        if (standing_result != 0) return standing_result;
        const objection_result = objection(use, request, &standing);
        if (objection_result != 0) return objection_result;
        if (thread.row == thread_module.no_row or thread.sequence != standing.sequence) {
            var refusal: session_module.Refusal = undefined;
            const attached = session.attachThread(thread, standing.sequence, &refusal) catch |err| switch (err) {
                error.Lost => continue,
                error.Refused => return negativeErrno(refusal.errno),
                error.HeldByThisThread, error.Interrupted => return errnoOf(err),
            };
            if (!attached) continue;
        }
        var claim: producer.Claim = undefined;
        switch (claimWithSpace(use, request, &standing, span, &claim)) {
            .claimed => {},
            .start_over => continue,
            .failed => |errno| return errno,
        }
        const view = claim.view;
        const row = thread.row;
        const entry = view.producerRow(row);
        @atomicStore(u64, &entry.open_claim, claim.position + 1, .monotonic);

        // Only now: whoever takes session, row or file away does it before it reads the head.
        const leased = @atomicLoad(u64, &entry.session, .seq_cst) == thread.lease;
        if (!leased or !session.isCurrent(standing.sequence) or verdictOn(&standing) != .routed) {
            _ = producer.abort(view, row, claim.position);
            closeClaim(use, entry);
            if (!leased) session.reconnect(standing.sequence) catch |err| return errnoOf(err);
            continue;
        }

        copyVectors(producer.payload(claim)[0..request.length_bytes], request.vectors);
        producer.seal(claim, .{
            .header_checksum = 0,
            .payload_checksum = 0,
            .length_bytes = request.length_bytes,
            .operation = @intFromEnum(request.operation),
            .flags = 0,
            .position = 0,
            .file_id = standing.file_id,
            .offset = request.offset,
            .handle = standing.handle,
            .argument = request.argument,
            .time_ns = if (request.operation == .allocate) request.allocate_bytes else system.monotonicNs(),
            .resolved_offset = 0,
        });
        const committed = producer.commit(claim);
        closeClaim(use, entry);
        if (committed == .aborted) continue;
        producer.ringDoorbell(view);

        ticket.* = .{ .position = @intCast(claim.position), .ordinal = standing.ring.ordinal };
        // A barrier changes nothing that a reader would have to wait for.
        if (request.operation != .barrier) use.file.inode.noteOperation(ticket.*);
        const counters = &session.row_counters[row];
        Counters.addOwn(&counters.operations, 1);
        Counters.addOwn(&counters.bytes, request.length_bytes);
        producer.fetchAhead(view, claim.position + span);
        if (session.currentRing() != standing.ring) return ring_lost;
        // The next operation of this thread must not overtake this one, and the positions do not speak for it.
        if (committed == .committed_passed) {
            const released = awaitRelease(use, standing.ring, claim.position);
            // A barrier that was passed says nothing of what stands behind it, which its owner may have seen: another one.
            if (released != 0 or request.operation != .barrier) return released;
            continue;
        }
        return 0;
    }
    return system.negative(.IO);
}

fn closeClaim(use: *Use, entry: *ring.ProducerRow) void {
    use.operation.opening = 0;
    @atomicStore(u64, &entry.open_claim, 0, .monotonic);
}

/// Never beyond `payload`, whatever another thread of the application does to the vectors meanwhile.
fn copyVectors(payload: []u8, vectors: []const Vector) void {
    var rest = payload;
    for (vectors) |vector| {
        const length = @min(vector.length, rest.len);
        if (length == 0) continue;
        const base = vector.base orelse continue;
        @memcpy(rest[0..length], base[0..length]);
        rest = rest[length..];
    }
    if (rest.len > 0) @memset(rest, 0);
}

const Space = union(enum) { claimed, start_over, failed: i32 };

fn claimWithSpace(use: *Use, request: *const Request, standing: *const Standing, span: u32, claim: *producer.Claim) Space {
    const view = standing.ring.view;
    const credit: ?producer.Credit = if (session.positionsView()) |memory| .{ .view = memory, .route = standing.route } else null;
    const thread = use.thread;
    const row = thread.row;
    const opening = &use.operation.opening;
    // A copy: a signal handler may come in, and write to another ring.
    var allowed_below: u64 = if (thread.allowed_route == standing.route) thread.allowed_below else 0;
    defer if (thread.sequence == standing.sequence) {
        thread.allowed_route = standing.route;
        thread.allowed_below = allowed_below;
    };
    const line: ?*const positions.RoutePositions = if (credit) |given| given.view.route(standing.route) else null;
    var timed_out = false;
    while (true) {
        const closed = request.may_fail_when_full and line != null and isClosed(line.?);
        const claimed = if (closed) error.Full else producer.claim(view, row, span, credit, opening, &allowed_below);
        claim.* = claimed catch |err| switch (err) {
            error.Full => {
                if (request.may_fail_when_full) {
                    if (use.file.currentMode().nonblocking) return .{ .failed = system.negative(.AGAIN) };
                    if (standing.flags.on_full_error) return .{ .failed = system.negative(.NOSPC) };
                }
                if (timed_out) {
                    if (!session.isCurrent(standing.sequence)) return .start_over;
                    const refusal = objection(use, request, standing);
                    if (refusal != 0) return .{ .failed = refusal };
                    if (session.daemonIsGone(standing.sequence)) {
                        session.reconnect(standing.sequence) catch |failed| return .{ .failed = errnoOf(failed) };
                        return .start_over;
                    }
                } else Counters.add(&session.counters.full_ring_waits, 1);
                if (closed) {
                    const generation = @atomicLoad(u32, &line.?.generation, .seq_cst);
                    if (!isClosed(line.?)) continue;
                    const woken = wait.forAdmission(line.?, generation);
                    if (wait.isEnded(woken)) return .{ .failed = system.negative(.INTR) };
                    timed_out = woken == .timed_out;
                    continue;
                }
                const space = wait.Space.begin(view);
                defer space.end();
                // A release before `begin` did not see us wait: look once more.
                claim.* = producer.claim(view, row, span, credit, opening, &allowed_below) catch |again| {
                    if (again == error.Damaged) continue;
                    const woken = space.sleep();
                    if (wait.isEnded(woken)) return .{ .failed = system.negative(.INTR) };
                    timed_out = woken == .timed_out;
                    continue;
                };
                return .claimed;
            },
            error.Damaged => {
                warnOnce(&warned_damage, "the ring's bookkeeping is damaged at its head; this operation fails with EIO. Restart the daemon: it repairs the ring and keeps what is whole", .{});
                return .{ .failed = system.negative(.IO) };
            },
        };
        if (timed_out) {
            Counters.add(&session.counters.late_wakes, 1);
            wait.countLateWake(view);
        }
        return .claimed;
    }
}

/// The route takes nothing that brings new data.
fn isClosed(line: *const positions.RoutePositions) bool {
    return @atomicLoad(u32, &line.closed, .acquire) != 0;
}

/// A passed claim is done when its slot is given back: it is logged and in the file then.
fn awaitRelease(use: *Use, lent: *const Ring, position: u64) i32 {
    const before = wait.ignoreSignals();
    defer wait.resumeSignals(before);
    while (!producer.isReleased(lent.view, position)) {
        const sequence = session.currentSequence();
        if (session.currentRing() != lent) return ring_lost;
        const space = wait.Space.begin(lent.view);
        defer space.end();
        if (producer.isReleased(lent.view, position)) return 0;
        if (space.sleep() != .timed_out) continue;
        if (producer.isReleased(lent.view, position)) {
            Counters.add(&session.counters.late_wakes, 1);
            wait.countLateWake(lent.view);
            return 0;
        }
        if (session.daemonIsGone(sequence)) {
            session.reconnect(sequence) catch |err| return errnoOf(err);
            const renewed = renew(use);
            if (renewed != 0) return renewed;
        }
    }
    return 0;
}

// ---- waiting ---------------------------------------------------------------------------------------------------

/// Until the operation behind `ticket` has reached `levels`. 0, -ETIMEDOUT, `ring_lost`, or -errno.
fn awaitPosition(use: *Use, ticket: Ticket, levels: wait.Levels, deadline_ns: u64) i32 {
    const inode = use.file.inode;
    while (true) {
        const sequence = session.currentSequence();
        const current = session.currentRing() orelse return system.negative(.IO);
        if (current.ordinal != ticket.ordinal) return ring_lost;
        const registered = @atomicLoad(u64, &inode.registered, .acquire);
        if (registered >> 32 != sequence) {
            // What a daemon had published before it was lost stays true.
            if (registered != 0 and registered >> 32 == session.mappedSequence()) {
                if (session.positionsView()) |before| {
                    const done = wait.reached(before.route(@truncate(registered)), ticket.position, levels);
                    if (done and session.isCurrent(sequence)) return 0;
                }
            }
            // Another daemon may count its routes otherwise: ask before believing any of its positions.
            const result = renew(use);
            // What its writers have left behind, who are closed: the daemon knows the file by itself.
            if (result == no_writer) return if (use.fd >= 0) askToDrain(use) else system.negative(.IO);
            if (result != 0) return result;
            continue;
        }
        const view = session.positionsView() orelse return system.negative(.IO);
        const line = view.route(@truncate(registered));
        const generation = @atomicLoad(u32, &line.generation, .seq_cst);
        const done = wait.reached(line, ticket.position, levels);
        const errno = @atomicLoad(i32, &line.failure_errno, .acquire);
        if (!session.isCurrent(sequence)) continue;
        if (done) return 0;
        if (errno != 0) return negativeErrno(errno);
        if (wait.patience.isOver()) return system.negative(.TIMEDOUT);
        if (deadline_ns != wait.no_deadline and system.monotonicNs() >= deadline_ns) return system.negative(.TIMEDOUT);
        const woken = wait.forPosition(line, generation, ticket.position, deadline_ns);
        if (wait.isEnded(woken)) return system.negative(.INTR);
        if (woken != .timed_out) continue;
        if (wait.reached(line, ticket.position, levels)) {
            if (!session.isCurrent(sequence)) continue;
            Counters.add(&session.counters.late_wakes, 1);
            wait.countLateWake(current.view);
        } else if (session.daemonIsGone(sequence)) {
            session.reconnect(sequence) catch |err| return errnoOf(err);
        }
    }
}

/// Registers some file of the inode in the current session, so that its route is known.
fn renew(use: *Use) i32 {
    if (use.fd >= 0 and !use.file.currentMode().observer) {
        var standing: Standing = undefined;
        const result = standingOf(use, &standing);
        return if (result == native) system.negative(.IO) else result;
    }
    var found = false;
    var writers = Writers{ .use = use };
    while (writers.next()) |writer| {
        defer descriptors.unpin(writer.file);
        var standing: Standing = undefined;
        var other = writer;
        if (standingOf(&other, &standing) == 0) return 0;
        found = true;
    }
    return if (found) system.negative(.IO) else no_writer;
}

/// The inode's files that are open for writing, for one that is not, or whose descriptor is gone. Each is held
/// until the caller unpins it.
const Writers = struct {
    use: *const Use,
    files: ?descriptors.Files = null,

    fn next(writers: *Writers) ?Use {
        if (writers.files == null) writers.files = .{ .inode = writers.use.file.inode };
        while (writers.files.?.next()) |file| {
            if (file.currentMode().observer or @atomicLoad(bool, &file.refused, .monotonic)) continue;
            const fd = @atomicLoad(i32, &file.descriptor_hint, .monotonic);
            const pinned = descriptors.pin(fd) orelse continue;
            if (pinned == file) return .{ .thread = writers.use.thread, .operation = writers.use.operation, .file = file, .fd = fd };
            descriptors.unpin(pinned);
        }
        return null;
    }
};

/// This process's operations on the inode are in the file. Nothing to wait for in another ring than the current:
/// what was lost there is reported as an error.
fn drainInode(use: *Use, levels: wait.Levels) i32 {
    const ticket = use.file.inode.lastTicket();
    if (ticket == Ticket.none) return 0;
    const current = session.currentRing() orelse return 0;
    if (ticket.ordinal != current.ordinal) return 0;
    return awaitPosition(use, ticket, levels, wait.no_deadline);
}

/// `drainInode`, and the kernel's offset stands where O_APPEND would have left it.
fn drainUse(use: *Use) i32 {
    const result = drainInode(use, .{ .applied = true });
    if (result != 0) return result;
    followAppends(use);
    return 0;
}

fn followAppends(use: *Use) void {
    const file = use.file;
    if (use.fd < 0 or !@atomicRmw(bool, &file.append_pending, .Xchg, false, .seq_cst)) return;
    var end: u64 = 0;
    for (0..restarts_max) |_| {
        const sequence = session.currentSequence();
        if (@atomicLoad(u32, &file.registered, .acquire) != sequence) break;
        const view = session.positionsView() orelse break;
        end = @atomicLoad(u64, &view.handle(@atomicLoad(u32, &file.handle, .monotonic)).append_end, .acquire);
        if (session.isCurrent(sequence)) break;
        end = 0;
    }
    if (end > 0 and end <= std.math.maxInt(i64)) {
        _ = linux.lseek(use.fd, @intCast(end), linux.SEEK.SET);
    } else {
        // Another daemon than the one that placed them: the end of the file is the best that is known.
        _ = linux.lseek(use.fd, 0, linux.SEEK.END);
    }
}

// ---- operations ------------------------------------------------------------------------------------------------

/// write, writev (`offset` null) and pwrite, pwritev.
///
/// Without O_APPEND and `offset`, the kernel's own offset is moved first, which claims the range against every
/// other writer that shares it; if the write is refused afterwards it is moved back, and a concurrent write
/// through the same open file description may have landed behind the gap.
pub fn write(fd: i32, vectors: []const Vector, offset: ?i64) i64 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return begun;
    defer use.end();
    if (use.file.currentMode().observer) return native;
    var total: usize = 0;
    for (vectors) |vector| {
        total = std.math.add(usize, total, vector.length) catch return system.negative(.INVAL);
        if (vector.length > 0 and vector.base == null) return system.negative(.FAULT);
    }
    if (total > std.math.maxInt(isize)) return system.negative(.INVAL);
    if (offset) |at| if (at < 0) return system.negative(.INVAL);
    const result = writeRouted(&use, vectors, total, offset);
    if (result == native) Counters.add(&session.counters.native_bytes, total);
    return result;
}

fn writeRouted(use: *Use, vectors: []const Vector, total: usize, offset: ?i64) i64 {
    if (use.isNative()) return native;
    if (total == 0) return 0;
    if (total > ring.payload_bytes_max) return goNativeFor(use, .large_write);
    const mode = use.file.currentMode();
    if (@atomicLoad(u64, &size_limit, .monotonic) != system.unlimited) {
        const result = respectSizeLimit(use, mode, total, offset);
        if (result != 0) return result;
    }
    // Before the offset is moved: what can be refused is refused here.
    var standing: Standing = undefined;
    const registered = standingOf(use, &standing);
    if (registered != 0) return registered;
    const earlier = deferredError(use.file, .consume);
    if (earlier != 0) return earlier;

    var request = Request{
        .operation = .append,
        .vectors = vectors,
        .length_bytes = @intCast(total),
        .may_fail_when_full = true,
    };
    var moved = false;
    if (mode.append and offset != null and @atomicLoad(bool, &use.file.append_pending, .seq_cst)) {
        // It appends, as the kernel does it, but leaves the offset where the writes before have moved it.
        const drained = drainUse(use);
        if (drained != 0) return reported(use.file, drained);
    }
    if (!mode.append) {
        request.operation = .write;
        if (offset) |at| {
            request.offset = @intCast(at);
        } else {
            const end = linux.lseek(use.fd, @intCast(total), linux.SEEK.CUR);
            if (system.failure(end)) |errno| switch (errno) {
                .INVAL, .OVERFLOW => return system.negative(.FBIG),
                else => {
                    // Closed behind our back, and the number is a pipe's or nobody's now.
                    _ = descriptors.remove(use.file, use.fd);
                    return native;
                },
            };
            request.offset = end - total;
            moved = true;
        }
        if (request.offset > file_bytes_max - total) {
            if (moved) moveBack(use.fd, total);
            return goNativeFor(use, .unsupported);
        }
    }
    var ticket: Ticket = undefined;
    const sent = submit(use, &request, &ticket);
    if (sent != 0) {
        if (moved) moveBack(use.fd, total);
        return reported(use.file, sent);
    }
    if (mode.append and offset == null) @atomicStore(bool, &use.file.append_pending, true, .seq_cst);
    const waited = awaitPromised(use, mode, ticket);
    return if (waited != 0) reported(use.file, waited) else @intCast(total);
}

fn moveBack(fd: i32, bytes: usize) void {
    _ = linux.lseek(fd, -@as(i64, @intCast(bytes)), linux.SEEK.CUR);
}

fn flagsOf(file: *File) routes.Flags {
    return @bitCast(@atomicLoad(u32, @as(*u32, @ptrCast(&file.flags)), .monotonic));
}

/// What the descriptor's flags and the route promise for when a write returns.
fn awaitPromised(use: *Use, mode: descriptors.Mode, written: Ticket) i32 {
    const flags = flagsOf(use.file);
    const levels = wait.Levels{ .durable = flags.flush_always, .applied = flags.visibility_immediate };
    if (!mode.synchronous and !levels.durable and !levels.applied) return 0;
    const before = wait.ignoreSignals();
    defer wait.resumeSignals(before);
    if (mode.synchronous) {
        const result = makeDurable(use, written);
        return if (result != 0) result else deferredError(use.file, .consume);
    }
    const result = awaitPosition(use, written, levels, wait.no_deadline);
    return if (result != 0) result else deferredError(use.file, .consume);
}

/// With a limit in force the kernel decides: it knows about short writes and SIGXFSZ. 0: well below it.
fn respectSizeLimit(use: *Use, mode: descriptors.Mode, total: u64, offset: ?i64) i64 {
    const start: u64 = start: {
        if (mode.append) {
            const drained = drainInode(use, .{ .applied = true });
            if (drained != 0) return reported(use.file, drained);
            const status = system.fileStatus(use.fd) orelse return native;
            break :start status.size_bytes;
        }
        if (offset) |at| break :start @intCast(at);
        const at = linux.lseek(use.fd, 0, linux.SEEK.CUR);
        if (system.failure(at) != null) return native;
        break :start at;
    };
    if (start +| total <= @atomicLoad(u64, &size_limit, .monotonic)) return 0;
    return goNativeFor(use, .unsupported);
}

/// `native` once the file is, or why it could not be made so.
fn goNativeFor(use: *Use, reason: Reason) i32 {
    const result = leave(use, .{ .fence = reason });
    return if (result == 0) native else result;
}

pub fn fsync(fd: i32) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return begun;
    defer use.end();
    const both = wait.Levels{ .durable = true, .applied = true };
    if (use.isNative()) return native;
    const written = use.file.inode.lastTicket();
    if (use.file.currentMode().observer) {
        // Legal on a descriptor that is only read: then the kernel's own fsync follows.
        const result = drainInode(&use, both);
        return if (result != 0) reported(use.file, result) else native;
    }
    if (written == Ticket.none and !@atomicLoad(bool, &use.file.was_registered, .monotonic)) {
        // Nothing of ours is on its way. Another process's may be, if the file is marked. (`native` would be for good.)
        if (!isMarked(fd)) return if (system.failure(linux.fsync(fd))) |errno| system.negative(errno) else 0;
    }
    const result = makeDurable(&use, written);
    if (result != 0) return reported(use.file, result);
    return deferredError(use.file, .consume);
}

/// Durable and in the file, with all that stood before: by the positions alone where nobody else writes the file
/// and its route syncs by itself, else by a barrier in the ring.
fn makeDurable(use: *Use, written: Ticket) i32 {
    const both = wait.Levels{ .durable = true, .applied = true };
    var standing: Standing = undefined;
    const registered = standingOf(use, &standing);
    if (registered != 0) return registered;
    if (written != Ticket.none and written.ordinal == standing.ring.ordinal and !mustAsk(standing.flags, standing.route)) {
        if (isAlone(use) and session.isCurrent(standing.sequence)) {
            const result = awaitPosition(use, written, both, system.monotonicNs() + wait.slice_ns);
            if (result != system.negative(.TIMEDOUT)) return result;
            // Slow, or a route that waits to be asked since just now: ask.
        }
    }
    var barrier: Ticket = undefined;
    const sent = submit(use, &.{ .operation = .barrier }, &barrier);
    if (sent != 0) return sent;
    return awaitPosition(use, barrier, both, wait.no_deadline);
}

/// The route makes nothing durable at once by itself: by what the table of routes said when the file was opened, or by
/// what the daemon says now (a reload may have changed it).
fn mustAsk(flags: routes.Flags, route: u32) bool {
    if (flags.durable_when_asked) return true;
    const view = session.positionsView() orelse return true;
    return @atomicLoad(u32, &view.route(route).durable_when_asked, .acquire) != 0;
}

fn isMarked(fd: i32) bool {
    var attribute: wal.FileAttribute = undefined;
    const length = linux.fgetxattr(fd, wal.attribute_name, std.mem.asBytes(&attribute), @sizeOf(wal.FileAttribute));
    if (system.failure(length)) |errno| return errno == .RANGE; // larger than ours: of a later version
    return length > 0;
}

pub fn ftruncate(fd: i32, length_bytes: i64) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return begun;
    defer use.end();
    if (use.isNative() or use.file.currentMode().observer) return native;
    if (length_bytes < 0) return system.negative(.INVAL);
    if (length_bytes > @atomicLoad(u64, &size_limit, .monotonic) or length_bytes > file_bytes_max) return goNativeFor(&use, .unsupported);
    return perform(&use, &.{ .operation = .truncate, .offset = @intCast(length_bytes) });
}

const FALLOC_FL_KEEP_SIZE = 0x01;

pub fn fallocate(fd: i32, mode: i32, offset: i64, length_bytes: i64) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return begun;
    defer use.end();
    if (use.isNative() or use.file.currentMode().observer) return native;
    if (offset < 0 or length_bytes <= 0) return system.negative(.INVAL);
    const end = std.math.add(i64, offset, length_bytes) catch return system.negative(.FBIG);
    // Ranges that are taken out or put in shift the rest of the file: done twice, in a replay, they destroy it.
    // Ranges that are emptied stay native too: the daemon logs what makes room, and nothing else.
    if (mode & ~@as(i32, FALLOC_FL_KEEP_SIZE) != 0) return goNativeFor(&use, .unsupported);
    if (end > @atomicLoad(u64, &size_limit, .monotonic) or end > file_bytes_max) return goNativeFor(&use, .unsupported);
    return perform(&use, &.{
        .operation = .allocate,
        .offset = @intCast(offset),
        .argument = @bitCast(mode),
        .allocate_bytes = @intCast(length_bytes),
    });
}

/// One operation, in order with all others, done when this returns.
fn perform(use: *Use, request: *const Request) i32 {
    var standing: Standing = undefined;
    const registered = standingOf(use, &standing);
    if (registered != 0) return registered;
    const errors = errorsOf(use.file);
    var ticket: Ticket = undefined;
    const sent = submit(use, request, &ticket);
    if (sent != 0) return reported(use.file, sent);
    const before = wait.ignoreSignals();
    defer wait.resumeSignals(before);
    const result = awaitPosition(use, ticket, .{ .applied = true }, wait.no_deadline);
    if (result != 0) return reported(use.file, result);
    const outcome = if (request.operation == .truncate) awaitCut(use) else 0;
    // An error of earlier writes that was there before stays for the next write, fsync or close.
    if (outcome == 0 and std.meta.eql(errorsOf(use.file), errors)) return 0;
    const earlier = deferredError(use.file, .consume);
    return if (outcome != 0) outcome else earlier;
}

/// A truncate of a file whose target refuses is in the log; the daemon is asked what it came to.
fn awaitCut(use: *Use) i32 {
    if (failureOf(use.file) == 0) return 0;
    const asked = askToDrain(use);
    if (asked != 0) return asked;
    const errno = failureOf(use.file);
    return if (errno != 0) negativeErrno(errno) else 0;
}

/// A deferred error is shown, not consumed: who only reads may ignore it, and the next write, fsync or close
/// still reports it.
pub fn drain(fd: i32) i32 {
    return drainWith(fd, drainEverybody);
}

fn drainOwn(use: *Use) i32 {
    return drainInode(use, .{ .applied = true });
}

fn drainWith(fd: i32, comptime function: fn (*Use) i32) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun == native) return 0;
    if (begun != 0) return begun;
    defer use.end();
    if (use.isNative()) return 0;
    const result = function(&use);
    if (result != 0) return shown(result);
    followAppends(&use);
    return deferredError(use.file, .peek);
}

/// For a look at the file: what any process has written to it, and whose write has returned, is in it.
fn drainEverybody(use: *Use) i32 {
    const is_observer = use.file.currentMode().observer;
    if (!is_observer and isRegistered(use.file)) return drainThrough(use);
    if (@atomicLoad(u32, &use.file.inode.references, .monotonic) > 1) {
        var writers = Writers{ .use = use };
        while (writers.next()) |writer| {
            defer descriptors.unpin(writer.file);
            if (!isRegistered(writer.file)) continue;
            // An operation on that file as well: it may find that the file is to be native, and wait for all but its own.
            var other = writer;
            other.operation = use.thread.push(@intFromPtr(&other)) orelse return system.negative(.DEADLK);
            defer use.thread.pop(other.operation);
            other.operation.file = writer.file;
            return drainThrough(&other);
        }
    }
    const own = drainOwn(use);
    // Without the mark nobody has it open for writing through Elgate: it is set before the first handle is given out,
    // and taken off when nothing is on its way any more.
    if (own != 0 or use.fd < 0 or !mayBeMarked(use)) return own;
    return if (is_observer) askToDrain(use) else drainThrough(use);
}

/// By a look at the inode; or by two words of the positions memory, while no file has got the mark since the last one.
fn mayBeMarked(use: *const Use) bool {
    const mapped = session.mappedSequence();
    const view = session.positionsView() orelse return isMarked(use.fd);
    const generation = @atomicLoad(u32, &view.header().marks_generation, .seq_cst);
    const now = @as(u64, mapped) << 32 | generation;
    const holds = positions.isServed(view.header()) and session.isCurrent(mapped);
    if (holds and @atomicLoad(u64, &use.file.unmarked, .monotonic) == now) return false;
    if (isMarked(use.fd)) return true;
    if (holds) @atomicStore(u64, &use.file.unmarked, now, .monotonic);
    return false;
}

/// In the session whose positions are mapped, be it lost.
fn isRegistered(file: *File) bool {
    const mapped = session.mappedSequence();
    return mapped != 0 and @atomicLoad(u32, &file.registered, .acquire) == mapped;
}

/// By our own position where nobody else has the file open for writing; else by a barrier, which the daemon answers
/// when it has looked at every ring that holds the file.
fn drainThrough(use: *Use) i32 {
    if (isAlone(use)) return drainOwn(use);
    var standing: Standing = undefined;
    const registered = standingOf(use, &standing);
    if (registered != 0) return if (registered == native) 0 else registered;
    if (isAlone(use)) return drainOwn(use);
    var barrier: Ticket = undefined;
    const sent = submit(use, &.{ .operation = .barrier, .argument = ring.barrier_look }, &barrier);
    if (sent != 0) return if (sent == native) 0 else sent;
    return awaitPosition(use, barrier, .{ .applied = true }, wait.no_deadline);
}

/// Nobody else has the file open for writing: the daemon says so whose positions are mapped, and no other one has come
/// since, which may have let others in.
fn isAlone(use: *const Use) bool {
    const mapped = session.mappedSequence();
    if (!isRegistered(use.file)) return false;
    const view = session.positionsView() orelse return false;
    if (@atomicLoad(u32, &view.handle(@atomicLoad(u32, &use.file.handle, .monotonic)).file_handles, .seq_cst) != 1) return false;
    const still = positions.isServed(view.header()) or isUnserved(use.thread, mapped);
    return still and session.mappedSequence() == mapped;
}

/// The daemon is gone, and no other one is there: the next one would have taken back this thread's row.
fn isUnserved(thread: *const Thread, mapped: u32) bool {
    if (thread.row == thread_module.no_row or thread.sequence != mapped or !thread.ring.?.is_named) return false;
    // In the moment in which it dies its socket may still be there: the same session, and nothing of another one.
    if (session.reconnectAtOnce() and !session.isCurrent(mapped)) return false;
    return @atomicLoad(u64, &thread.ring.?.view.producerRow(thread.row).session, .seq_cst) == thread.lease;
}

/// A descriptor that is only read has no handle, and so no place in the ring.
fn askToDrain(use: *Use) i32 {
    const deadline_ns = system.monotonicNs() +| session.reconnect_limit_ns;
    for (0..restarts_max) |_| {
        session.ensureConnected() catch |err| return errnoOf(err);
        var refusal: session_module.Refusal = undefined;
        session.drainFile(use.fd, &refusal) catch |err| switch (err) {
            error.Lost => if (system.monotonicNs() >= deadline_ns) return system.negative(.IO) else continue,
            error.Refused => return negativeErrno(refusal.errno),
            error.HeldByThisThread, error.Interrupted => return errnoOf(err),
        };
        return 0;
    }
    return system.negative(.IO);
}

/// What this process has written, to whichever file; the first error. `timeout_ms` < 0: as long as any wait.
pub fn drainAll(timeout_ms: i64) i32 {
    const before = wait.patience;
    defer wait.patience = before;
    if (timeout_ms >= 0) {
        const limit_ns = @as(u64, @intCast(timeout_ms)) *| std.time.ns_per_ms;
        wait.patience.deadline_ns = @min(before.deadline_ns, system.monotonicNs() +| limit_ns);
    }
    var first: i32 = 0;
    for (0..descriptors.used()) |fd| {
        const result = drainWith(@intCast(fd), drainOwn);
        if (first == 0 or result == system.negative(.INTR)) first = result;
        if (result == system.negative(.TIMEDOUT) or result == system.negative(.INTR)) break;
    }
    return first;
}

/// 1 if operations on the descriptor go through Elgate, or must be preceded by a drain.
pub fn isRouted(fd: i32) i32 {
    var use: Use = undefined;
    if (use.begin(fd) != 0) return 0;
    defer use.end();
    return if (use.isNative()) 0 else 1;
}

// ---- explicit appends ------------------------------------------------------------------------------------------

/// An append that gives a ticket to wait on. Does not move the descriptor's offset, unless it is O_APPEND.
pub fn append(fd: i32, vector: Vector, ticket_bits: *u64) i64 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return begun;
    defer use.end();
    if (use.isNative() or use.file.currentMode().observer) return native;
    if (vector.length > 0 and vector.base == null) return system.negative(.FAULT);
    if (vector.length > ring.payload_bytes_max) return system.negative(.MSGSIZE);
    const earlier = deferredError(use.file, .consume);
    if (earlier != 0) return earlier;
    var ticket: Ticket = Ticket.none;
    const sent = submit(&use, &.{
        .operation = .append,
        .vectors = &.{vector},
        .length_bytes = @intCast(vector.length),
        .may_fail_when_full = true,
    }, &ticket);
    if (sent != 0) return reported(use.file, sent);
    if (use.file.currentMode().append) @atomicStore(bool, &use.file.append_pending, true, .seq_cst);
    ticket_bits.* = ticket.bits();
    return @intCast(vector.length);
}

pub fn awaitTicket(fd: i32, ticket_bits: u64, level: Level, timeout_ms: i64) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return begun;
    defer use.end();
    const levels: wait.Levels = switch (level) {
        .accepted => .{},
        .logged => .{ .logged = true },
        .durable => .{ .durable = true },
        .applied => .{ .applied = true },
        _ => return system.negative(.INVAL),
    };
    const ticket: Ticket = @bitCast(ticket_bits);
    if (ticket == Ticket.none or ticket.reserved != 0) return system.negative(.INVAL);
    if (level == .accepted) return 0;
    if (use.isNative()) return 0; // all was applied and synced before it became so
    const limit_ns = if (timeout_ms < 0) session.reconnect_limit_ns else @as(u64, @intCast(timeout_ms)) *| std.time.ns_per_ms;
    const now_ns = system.monotonicNs();
    const deadline_ns = now_ns +| limit_ns;
    const ask = levels.durable and mustAsk(flagsOf(use.file), @truncate(@atomicLoad(u64, &use.file.inode.registered, .acquire)));
    // Where a route syncs by itself, 100 ms pass before somebody asks whether it still does.
    const first = if (ask) now_ns else if (levels.durable) @min(deadline_ns, now_ns + wait.slice_ns) else deadline_ns;
    // A test stub records that somebody asks, whether that is needed or not.
    const is_recorded = levels.durable and session.serves_test_stub;
    var result = if (is_recorded) system.negative(.TIMEDOUT) else awaitPosition(&use, ticket, levels, first);
    if (result == system.negative(.TIMEDOUT) and (ask or first < deadline_ns)) {
        var barrier: Ticket = undefined;
        const sent = submit(&use, &.{ .operation = .barrier }, &barrier);
        if (sent != 0) return reported(use.file, sent);
        result = awaitPosition(&use, ticket, levels, deadline_ns);
    }
    return if (result != 0) reported(use.file, result) else deferredError(use.file, .consume);
}

/// The highest level that the operation behind `ticket` has reached together with all below it, by what is known without
/// waiting; -errno.
pub fn levelOf(fd: i32, ticket_bits: u64) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return begun;
    defer use.end();
    const ticket: Ticket = @bitCast(ticket_bits);
    if (ticket == Ticket.none or ticket.reserved != 0) return system.negative(.INVAL);
    if (use.isNative()) return @intFromEnum(Level.applied); // all was applied and synced before it became so
    for (0..restarts_max) |_| {
        const sequence = session.currentSequence();
        const current = session.currentRing() orelse return system.negative(.IO);
        if (current.ordinal != ticket.ordinal) return shown(ring_lost);
        const registered = @atomicLoad(u64, &use.file.inode.registered, .acquire);
        // What a daemon has published stays true when it is gone; another one has not said anything yet.
        var level: Level = .accepted;
        if (registered != 0 and registered >> 32 == session.mappedSequence()) {
            if (session.positionsView()) |view| level = levelBy(view.route(@truncate(registered)), ticket.position);
        }
        if (!session.isCurrent(sequence)) continue;
        // A target that refuses counts as applied: others must not wait for it.
        if (level == .applied and deferredError(use.file, .peek) != 0) level = .durable;
        return @intFromEnum(level);
    }
    return @intFromEnum(Level.accepted);
}

fn levelBy(line: *const positions.RoutePositions, position: u64) Level {
    if (!wait.reached(line, position, .{ .logged = true })) return .accepted;
    if (!wait.reached(line, position, .{ .durable = true })) return .logged;
    return if (wait.reached(line, position, .{ .applied = true })) .applied else .durable;
}

// ---- opening, sharing, closing ---------------------------------------------------------------------------------

/// After a native open. 1 routed, 0 native, -errno: the open must fail.
pub fn opened(fd: i32, flags: linux.O) i32 {
    session.checkFork();
    const before = wait.ignoreSignals(); // the file is open
    defer wait.resumeSignals(before);
    // The number was free for the kernel: what we have under it was closed behind our back.
    if (descriptors.has(fd)) forget(fd);
    const state = session.currentState();
    if (state == .idle or state == .disabled) return 0;
    if (flags.PATH or flags.DIRECTORY) return 0;
    const observer = flags.ACCMODE == .RDONLY;
    if (state == .passthrough and observer) return 0;
    const status = system.fileStatusWithBirth(fd) orelse return 0;
    if (!status.isRegular() or status.links == 0) return 0;
    if (state == .passthrough) {
        // There may be more in the log than in the file, and nobody is there to say: never past it.
        if (!isMarked(fd)) return 0;
        session.ensureConnected() catch {
            warnMarked(fd);
            return system.negative(.IO);
        };
    }
    var buffer: path_module.Buffer = undefined;
    const path = path_module.ofDescriptor(fd, &buffer) orelse return 0;
    const match = session.match(path) orelse return 0;
    // Only what others have open is still theirs.
    if (match.flags.retired and !isMarked(fd)) return 0;
    readSizeLimit();
    // Beside others that have it open through Elgate the daemon decides: all of them write it natively from then on.
    if (status.links > 1 and !isMarked(fd)) {
        if (!observer) countFallback(fallback_reason_offset + @intFromEnum(Reason.linked));
        return 0;
    }
    const mode = descriptors.Mode{
        .observer = observer,
        .append = flags.APPEND,
        .nonblocking = flags.NONBLOCK,
        .synchronous = flags.DSYNC or flags.SYNC,
    };
    const added = descriptors.add(fd, status, mode, &match.name, match.flags) catch return 0;
    const file = added orelse {
        if (!observer) countFallback(@intFromEnum(control.Refusal.limit_reached));
        return 0;
    };
    const already_native = file.inode.currentCare() == .native;
    // No pin of ours from here on: whoever makes the file native waits for all of them.
    descriptors.unpin(file);
    if (observer) return if (already_native) 0 else 1;
    const direct = flags.DIRECT;
    if (!already_native and !direct and !flags.TRUNC) return 1;
    return openedSpecially(fd, already_native, direct);
}

/// Opened with O_DIRECT or O_TRUNC, or native in this process already: whatever the log has for the file, from
/// whichever process, must not be applied over what comes now.
fn openedSpecially(fd: i32, already_native: bool, direct: bool) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return 0;
    defer use.end();
    if (already_native) return shown(fenceOff(&use, .mapped));
    if (direct) return leave(&use, .{ .fence = .direct });
    if (use.file.inode.lastTicket() == Ticket.none and !isMarked(fd)) return 1;
    // The kernel has cut the file already; the log has to know, or a replay would bring the old bytes back.
    const result = perform(&use, &.{ .operation = .truncate, .offset = 0 });
    if (result == native) return 0;
    return if (result == 0) 1 else result;
}

/// Before close(2). The caller closes in any case.
pub fn close(fd: i32) i32 {
    if (!descriptors.has(fd)) {
        // A program that closes what it did not open: the connection moves out of its way.
        if (session.ownsDescriptor(fd) and !session.inBorrowedMemory()) session.moveDescriptor(fd);
        return 0;
    }
    session.checkFork();
    if (session.inBorrowedMemory()) return 0;
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun == native) return 0;
    if (begun != 0) return begun;
    defer use.end();
    return takeOut(&use, fd);
}

/// Drains, takes the descriptor out, and with the last one lets go of the registration. The error to report.
fn takeOut(use: *Use, fd: i32) i32 {
    const file = use.file;
    var result: i32 = 0;
    if (!use.isNative()) {
        result = reported(file, drainUse(use));
        if (result == system.negative(.INTR)) return result;
        const earlier = deferredError(file, .consume);
        if (result == 0) result = earlier;
    }
    const last = descriptors.remove(file, fd) orelse return result;
    if (!last) return result;
    const before = wait.ignoreSignals();
    defer wait.resumeSignals(before);
    if (!use.isNative()) {
        // What another thread has written since.
        const again = reported(file, drainInode(use, .{ .applied = true }));
        if (result == 0) result = again;
    }
    if (file.pins() == use.thread.operationsOn(file)) releaseRegistration(file);
    return result;
}

fn releaseRegistration(file: *File) void {
    // As long as the daemon has a native handle of ours, nobody else's writes go through the log beside ours.
    if (@atomicLoad(bool, &file.inode.native_for_good, .seq_cst) and
        @atomicRmw(u32, &kept_for_good, .Add, 1, .monotonic) < kept_for_good_max) return;
    const sequence = @atomicRmw(u32, &file.registered, .Xchg, 0, .seq_cst);
    if (sequence == 0 or !session.isCurrent(sequence)) return;
    session.releaseFile(sequence, file.file_id, file.handle) catch {};
}

/// The last operation on a file whose descriptors are closed has ended.
fn takeLeave(file: *File) void {
    releaseRegistration(file);
    descriptors.recycle(file);
}

/// The number is not the file's any more; nothing can be done through it.
fn forget(fd: i32) void {
    var use: Use = undefined;
    if (use.begin(fd) != 0) return;
    defer use.end();
    use.fd = -1;
    _ = takeOut(&use, fd);
}

pub fn duplicated(fd: i32, copy: i32) i32 {
    if (fd == copy) return if (descriptors.has(fd)) 0 else native;
    if (!descriptors.has(fd) and !descriptors.has(copy)) return native;
    session.checkFork();
    const before = wait.ignoreSignals(); // the copy is there
    defer wait.resumeSignals(before);
    if (session.inBorrowedMemory()) return native;
    if (descriptors.has(copy)) forget(copy);
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun != 0) return begun;
    defer use.end();
    if (!descriptors.share(use.file, copy)) {
        // A number beyond the table cannot be followed.
        return goNativeFor(&use, .passed_on);
    }
    return if (use.isNative()) native else 0;
}

pub fn flagsChanged(fd: i32) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun == native) return 0;
    if (begun != 0) return begun;
    defer use.end();
    const flags = system.statusFlags(fd) orelse return 0;
    const before = use.file.currentMode();
    var after = before;
    after.append = flags.APPEND;
    after.nonblocking = flags.NONBLOCK;
    after.synchronous = flags.DSYNC or flags.SYNC;
    if (before.append and !after.append and !use.isNative()) {
        const result = drainUse(&use);
        if (result != 0) return shown(result);
    }
    use.file.setMode(after);
    if (flags.DIRECT and !use.isNative()) return leave(&use, .{ .fence = .direct });
    return 0;
}

// ---- going native ----------------------------------------------------------------------------------------------

pub fn goNative(fd: i32, reason: Reason) i32 {
    var use: Use = undefined;
    const begun = use.begin(fd);
    if (begun == native) return 0;
    if (begun != 0) return begun;
    defer use.end();
    return leave(&use, .{ .fence = reason });
}

/// The file is about to lose its last name. Whoever has it open has it for itself then: no replay would find it, and a
/// daemon that comes after this one could not take it back. (Where other processes have it open, the daemon fences it when
/// the removal is said.) 0, or -EINTR: where it cannot be fenced, on a full disk for
/// one, it stays routed, and can be removed all the same.
pub fn losesName(device: u64, number: u64) i32 {
    for (0..descriptors.used()) |index| {
        const fd: i32 = @intCast(index);
        var use: Use = undefined;
        if (use.begin(fd) != 0) continue;
        defer use.end();
        const inode = use.file.inode;
        if (inode.device != device or inode.number != number or use.file.currentMode().observer) continue;
        return if (leave(&use, .{ .fence = .unlinked }) == system.negative(.INTR)) system.negative(.INTR) else 0;
    }
    return 0;
}

const Leave = union(enum) {
    fence: Reason,
    /// Another process has fenced it.
    fenced_elsewhere,
};

/// Makes the inode native for this process: no operation is under way, all are applied, and a fence is logged
/// that no replay goes back behind. On an error it stays routed.
fn leave(use: *Use, how: Leave) i32 {
    const inode = use.file.inode;
    if (use.isNative()) return 0;
    if (@cmpxchgStrong(descriptors.Care, &inode.care, .routed, .leaving, .seq_cst, .seq_cst)) |seen| {
        if (seen == .native) return 0;
        if (use.thread.leaving == inode) return system.negative(.DEADLK);
        const result = use.awaitOutcome();
        if (result != 0) return result;
        return if (inode.currentCare() == .native) 0 else system.negative(.BUSY);
    }
    use.thread.leaving = inode;
    defer use.thread.leaving = null;
    const result = result: {
        const quiet = awaitQuiet(use);
        if (quiet != 0) break :result quiet;
        switch (how) {
            .fence => |reason| break :result fenceOff(use, reason),
            .fenced_elsewhere => {
                const drained = drainInode(use, .{ .applied = true });
                break :result if (drained != 0) drained else registerWriters(use);
            },
        }
    };
    if (result != 0) {
        @atomicStore(descriptors.Care, &inode.care, .routed, .seq_cst);
        return shown(result);
    }
    followAppends(use);
    switch (how) {
        .fence => |reason| {
            // A mapping, or a descriptor in another process, outlives ours.
            if (reason == .mapped or reason == .passed_on) @atomicStore(bool, &inode.native_for_good, true, .seq_cst);
            countFallback(fallback_reason_offset + @intFromEnum(reason));
        },
        .fenced_elsewhere => countFallback(fallback_reason_offset + @intFromEnum(Reason.passed_on)),
    }
    // The registrations stay until the descriptors are closed: they tell the daemon that the file is native.
    @atomicStore(descriptors.Care, &inode.care, .native, .seq_cst);
    return 0;
}

/// Until nobody but this thread and those parked is in an operation on the inode.
fn awaitQuiet(use: *Use) i32 {
    const inode = use.file.inode;
    const deadline_ns = system.monotonicNs() + session.reconnect_limit_ns;
    while (true) {
        var busy: u64 = 0;
        var iterator = descriptors.Files{ .inode = inode };
        while (iterator.next()) |file| busy += file.pins() -| use.thread.operationsOn(file);
        if (busy <= @atomicLoad(u32, &inode.parked, .seq_cst)) return 0;
        if (system.monotonicNs() >= deadline_ns) return system.negative(.BUSY);
        _ = system.sleepNs(100 * std.time.ns_per_us);
    }
}

/// Also where the log has never heard of the file: whoever comes to it through Elgate must learn from the daemon
/// that it is written natively here.
fn fenceOff(use: *Use, reason: Reason) i32 {
    // What is native in this process already has it all since.
    if (use.file.inode.currentCare() != .native) {
        const drained = drainInode(use, .{ .applied = true });
        if (drained != 0) return drained;
    }
    const fenced = if (use.file.currentMode().observer) fenceThroughWriter(use, reason) else fenceThrough(use, reason);
    return if (fenced != 0) fenced else registerWriters(use);
}

/// Each file of the inode that is open for writing holds a handle of its own: the daemon keeps the file native until
/// the last of them is closed, in whatever order they are.
fn registerWriters(use: *Use) i32 {
    var writers = Writers{ .use = use };
    while (writers.next()) |writer| {
        defer descriptors.unpin(writer.file);
        var other = writer;
        other.fencing = true;
        var standing: Standing = undefined;
        const result = standingOf(&other, &standing);
        if (result != 0 and result != native) return result; // `native`: the daemon does not take it
    }
    return 0;
}

/// A descriptor that is only read cannot be registered. Without a writer in this process there is nothing of
/// ours to fence.
fn fenceThroughWriter(use: *Use, reason: Reason) i32 {
    var writers = Writers{ .use = use };
    if (writers.next()) |writer| {
        defer descriptors.unpin(writer.file);
        var other = writer;
        return fenceThrough(&other, reason);
    }
    return 0;
}

fn fenceThrough(use: *Use, reason: Reason) i32 {
    use.fencing = true;
    defer use.fencing = false;
    for (0..restarts_max) |_| {
        var standing: Standing = undefined;
        const registered = standingOf(use, &standing);
        if (registered == native) return 0; // refused at its first registration: the log does not know it
        if (registered != 0) return registered;
        if (verdictOn(&standing) == .native and session.isCurrent(standing.sequence)) return 0;
        var refusal: session_module.Refusal = undefined;
        session.fenceFile(standing.sequence, standing.file_id, standing.handle, @intFromEnum(reason), &refusal) catch |err| switch (err) {
            error.Lost => continue,
            error.Refused => return negativeErrno(refusal.errno),
            error.HeldByThisThread, error.Interrupted => return errnoOf(err),
        };
        return 0;
    }
    return system.negative(.IO);
}

// ---- threads ---------------------------------------------------------------------------------------------------

/// Gives the calling thread's row back, if no operation of it is in progress.
pub fn detachThread() void {
    session.checkFork();
    const thread = thread_module.current(session.fork_epoch);
    var here: u8 = 0;
    while (thread.topDead(@intFromPtr(&here))) |dead| discard(thread, dead);
    if (thread.depth != 0) return;
    session.detachThread(thread);
}
