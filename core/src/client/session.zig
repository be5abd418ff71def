//! This process's session with the daemon: the control socket, the mappings that come through it, the rows of its
//! threads; finding the daemon again after it died, and starting anew in a forked child.
//!
//! One session per process. `sequence` names it: whatever was learned under one sequence (a handle, a row, the
//! index of a route) is worth nothing under another. It is also a sequence lock around the positions memory:
//!
//! ```
//!   even ──▶ odd: the mappings are being exchanged ──▶ even: new session
//!     └────▶ even + 2: the session is lost, the mappings stay
//! ```
//!
//! The positions memory of a new session is mapped over the old one, at the same address. So nobody can hold a
//! pointer into memory that is gone; a reader compares `sequence` before and after instead, and somebody who
//! sleeps on the old memory's futex looks again after 100 ms at the latest. Rings are never unmapped: a robust
//! mutex in them may be on some thread's list in the C library. A restarted daemon keeps its ring, so there are few.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const control = @import("../format/control.zig");
const positions = @import("../format/positions.zig");
const ring = @import("../format/ring.zig");
const routes = @import("../format/routes.zig");
const system = @import("system.zig");
const thread_module = @import("thread.zig");
const wait = @import("wait.zig");
const Lock = @import("lock.zig").Lock;
const Thread = thread_module.Thread;
const E = system.E;

pub const rings_max = 126;
const answer_timeout_ms = 5000;
/// Pauses between tries: doubling, from the first one.
pub const Backoff = struct {
    pause_ns: u64 = 20 * std.time.ns_per_ms,
    const pause_ns_max = 500 * std.time.ns_per_ms;

    /// Not beyond `deadline_ns`.
    pub fn sleep(backoff: *Backoff, deadline_ns: u64) system.Woken {
        const now_ns = system.monotonicNs();
        defer backoff.pause_ns = @min(2 * backoff.pause_ns, pause_ns_max);
        return system.sleepNs(@min(backoff.pause_ns, deadline_ns -| now_ns));
    }
};

/// A wait for the daemon that a signal has ended goes on where it was, if it is asked for again within this time: a
/// program with a fast timer would else wait for ever.
const resumed_wait_ns_max = std.time.ns_per_s;

const reconnect_default_ms = 30_000;
/// Where the client's own descriptors go: programs count on getting the low numbers.
const descriptor_floor = 512;
const socket_path_bytes_max = 107;

pub const Ring = struct {
    view: ring.View,
    uuid: [16]u8,
    /// 1…: tells this process's rings apart in a Ticket.
    ordinal: u7,
    /// To hand it back to a daemon that has lost it; -1: not to be had any more.
    fd: i32,
    /// Of what `fd` must be.
    inode: u64,
    /// It lies where the next daemon opens it, and ends every lease in it, before it serves anybody.
    is_named: bool,
};

/// A place in one of this process's rings. As the u64 that `elgate_append` gives out:
/// bits 0…55 the position, bits 56…62 the ring's ordinal, bit 63 zero.
pub const Ticket = packed struct(u64) {
    position: u56,
    ordinal: u7,
    reserved: u1 = 0,

    pub const none: Ticket = @bitCast(@as(u64, 0));

    pub fn bits(ticket: Ticket) u64 {
        return @bitCast(ticket);
    }
};

pub const State = enum(u32) {
    /// elgate_start has not been called, or elgate_stop has.
    idle,
    /// ELGATE_DISABLE=1.
    disabled,
    /// No daemon at the start, and ELGATE_FALLBACK says to go on without.
    passthrough,
    connected,
    /// The daemon is gone, or (in a fresh child) was never spoken to.
    lost,
};

const Fallback = enum { passthrough, wait, fail };

pub const Counters = struct {
    routed_files: u64 = 0,
    native_bytes: u64 = 0,
    native_fallbacks: u64 = 0,
    registrations: u64 = 0,
    reconnects: u64 = 0,
    full_ring_waits: u64 = 0,
    late_wakes: u64 = 0,
    last_fallback_reason: u64 = 0,

    pub fn add(counter: *u64, amount: u64) void {
        _ = @atomicRmw(u64, counter, .Add, amount, .monotonic);
    }

    /// Of a counter that one thread writes. A signal handler that comes in between may be forgotten: a locked addition
    /// for each operation would cost more than that is worth.
    pub fn addOwn(counter: *u64, amount: u64) void {
        @atomicStore(u64, counter, @atomicLoad(u64, counter, .unordered) + amount, .monotonic);
    }

    pub fn subtract(counter: *u64, amount: u64) void {
        _ = @atomicRmw(u64, counter, .Sub, amount, .monotonic);
    }
};

/// Of the threads that use one row, one after the other. Apart from each other: threads share no line.
pub const RowCounters = extern struct {
    operations: u64 align(64),
    bytes: u64,
};

/// What of a route a file must know. The index is worth something within one session only, the name always.
pub const RouteName = struct {
    bytes: [routes.name_bytes_max]u8 = @splat(0),
    length: u32 = 0,

    pub fn text(name: *const RouteName) []const u8 {
        return name.bytes[0..name.length];
    }
};

pub const Match = struct {
    name: RouteName,
    flags: routes.Flags,
};

pub const Registration = struct {
    sequence: u32,
    route: u32,
    handle: u32,
    file_id: u64,
    flags: ?routes.Flags,
    /// Value of HandleState.error_sequence that counts as reported.
    error_baseline: u32,
};

pub const Refusal = struct {
    reason: control.Refusal,
    errno: i32,
};

pub const Error = error{
    /// The daemon is gone, or said something that makes no sense. Try again after `reconnect`.
    Lost,
    /// `Refusal` says why.
    Refused,
    /// A signal handler came in while this thread holds the lock.
    HeldByThisThread,
    /// See wait.signals_end_waits.
    Interrupted,
};

/// What those above the session must do when it changes. Called with the session's lock held.
pub const Listener = struct {
    /// The daemon whose positions are mapped is gone, and they will be another one's.
    session_replaced: *const fn () void,
    /// The ring is replaced by another: `line` still says how far the daemon came in the old one.
    ring_replaced: *const fn (old: *const Ring) void,
    forked: *const fn () void,
    /// Whether a ring holds something of this process that is not known to be in its file.
    has_pending: *const fn () bool,
};

/// One page that a fork clears.
const ForkGuard = struct {
    /// 1: this is the process that set it. 0: a fresh child. 2: the child is being set up.
    attached: u32,
};

var static_guard = ForkGuard{ .attached = 1 };

pub const Session = struct {
    lock: Lock = .{},
    rows_lock: Lock = .{},
    guard: *ForkGuard = &static_guard,
    fork_epoch: u32 = 1,
    process_id: i32 = 0,

    state: State = .idle,
    sequence: u32 = 0,
    ring: ?*const Ring = null,
    rings: [rings_max]Ring = undefined,
    ring_count: u32 = 0,
    /// At one address from the first start on.
    positions_memory: ?[]align(std.heap.page_size_min) u8 = null,
    table: ?routes.Table = null,
    /// What to call this program in the hello.
    runtime: [16]u8 = @splat(0),
    session_id: u64 = 0,
    /// The daemon is the test stub.
    serves_test_stub: bool = false,
    /// What the daemon writes into each row that it lends to this session (ring.ProducerRow.session).
    lease: u64 = 0,
    /// The sequence under which the positions memory was mapped.
    mapped_sequence: u32 = 0,

    control_fd: i32 = -1,
    control_inode: u64 = 0,
    message_sequence: u32 = 0,
    /// Also one that is too long to be used, for the message that says so.
    socket_path: [512]u8 = undefined,
    socket_path_length: u32 = 0,
    /// The path is the one to use; else the last one that was tried.
    socket_settled: bool = false,
    connect_errno: E = .SUCCESS,
    /// At the last try a daemon was there, but not for this process's user.
    unserved: bool = false,
    warned_unserved: bool = false,

    fallback: Fallback = .passthrough,
    reconnect_limit_ns: u64 = reconnect_default_ms * std.time.ns_per_ms,
    /// The limit was reached once: until the daemon is back, each operation tries once and fails.
    gave_up: bool = false,
    /// When a wait for the daemon that a signal has ended would have been given up, and when it was ended.
    interrupted_deadline_ns: u64 = 0,
    interrupted_at_ns: u64 = 0,
    warned_protocol: bool = false,
    thread_key: ?c_uint = null,
    listener: ?Listener = null,

    /// Rows lent to this session that no thread holds now.
    free_rows: [ring.producer_rows]u16 = undefined,
    free_row_count: u32 = 0,
    free_rows_sequence: u32 = 0,

    counters: Counters = .{},
    row_counters: [ring.producer_rows]RowCounters = @splat(.{ .operations = 0, .bytes = 0 }),

    // ---- what operations look at, without the lock -------------------------------------------------------

    pub fn currentState(session: *Session) State {
        return @atomicLoad(State, &session.state, .acquire);
    }

    /// Odd while the mappings are exchanged; waits that out.
    pub fn currentSequence(session: *Session) u32 {
        while (true) {
            const sequence = @atomicLoad(u32, &session.sequence, .seq_cst);
            if (sequence % 2 == 0) return sequence;
            _ = system.sleepNs(50 * std.time.ns_per_us);
        }
    }

    pub fn isCurrent(session: *Session, sequence: u32) bool {
        return @atomicLoad(u32, &session.sequence, .seq_cst) == sequence;
    }

    pub fn currentRing(session: *Session) ?*const Ring {
        return @atomicLoad(?*const Ring, &session.ring, .seq_cst);
    }

    /// The session that the mapped positions belong to; the current one, or the one that was just lost.
    pub fn mappedSequence(session: *Session) u32 {
        return @atomicLoad(u32, &session.mapped_sequence, .seq_cst);
    }

    /// Null before the first session.
    pub fn positionsView(session: *Session) ?positions.View {
        if (session.currentRing() == null) return null;
        return .{ .memory = session.positions_memory orelse return null };
    }

    /// Every entry into the library on a routed descriptor comes by here. One load, unless a fork has happened.
    pub inline fn checkFork(session: *Session) void {
        if (@atomicLoad(u32, &session.guard.attached, .acquire) != 1) session.startAnewInChild();
    }

    /// True in a child of vfork, which runs in its parent's memory: it must change nothing there.
    pub fn inBorrowedMemory(session: *Session) bool {
        return session.process_id != 0 and linux.getpid() != session.process_id;
    }

    // ---- start, stop, fork -------------------------------------------------------------------------------

    /// 1 connected, 0 native, -errno.
    pub fn start(session: *Session, runtime: []const u8, listener: Listener) i32 {
        session.checkFork();
        session.lock.acquire() catch return system.negative(.DEADLK);
        defer session.lock.release();
        switch (session.currentState()) {
            .connected => return 1,
            .disabled, .passthrough => return 0,
            .lost => {
                session.connectUntilLimit() catch |err| return system.negative(if (err == error.Interrupted) .INTR else .IO);
                return 1;
            },
            .idle => {},
        }
        if (system.environment("ELGATE_DISABLE")) |value| {
            if (saysYes("ELGATE_DISABLE", value)) {
                session.setState(.disabled);
                return 0;
            }
        }
        session.listener = listener;
        @memset(&session.runtime, 0);
        const runtime_length = @min(runtime.len, session.runtime.len - 1);
        @memcpy(session.runtime[0..runtime_length], runtime[0..runtime_length]);
        session.readEnvironment();
        session.prepare() catch {
            system.warn("cannot reserve memory for the client; this process goes on without Elgate. Raise its address space limit (ulimit -v)", .{});
            session.setState(.passthrough);
            return 0;
        };
        session.process_id = linux.getpid();
        session.gave_up = false;

        if (session.handshake()) return 1 else |_| {}
        switch (session.fallback) {
            .passthrough => {
                if (session.unserved) {
                    session.goUnserved();
                    return 0;
                }
                session.setState(.passthrough);
                if (!session.warned_protocol) {
                    system.warn("no daemon at {s} ({s}); this process goes on without Elgate. Start one with `elgate daemon`, or set ELGATE_FALLBACK=wait or fail", .{ session.socketName(), @tagName(session.connect_errno) });
                }
                return 0;
            },
            .wait => {
                session.connectUntilLimit() catch |err| return system.negative(if (err == error.Interrupted) .INTR else session.connect_errno);
                return 1;
            },
            .fail => return system.negative(session.connect_errno),
        }
    }

    /// The words of a switch in the environment. What is none of them means yes: whoever set it meant something.
    fn saysYes(name: []const u8, value: []const u8) bool {
        for ([_][]const u8{ "0", "false", "no" }) |word| if (std.ascii.eqlIgnoreCase(value, word)) return false;
        for ([_][]const u8{ "1", "true", "yes" }) |word| if (std.ascii.eqlIgnoreCase(value, word)) return true;
        system.warn("{s} is \"{s}\"; it may be 1, true or yes, or 0, false or no. Taken as yes", .{ name, value[0..@min(value.len, 64)] });
        return true;
    }

    /// The caller has drained. Threads keep their rows until they end or write again.
    pub fn stop(session: *Session) void {
        session.lock.acquire() catch return;
        defer session.lock.release();
        session.drop();
        session.setState(.idle);
    }

    fn readEnvironment(session: *Session) void {
        session.fallback = .passthrough;
        if (system.environment("ELGATE_FALLBACK")) |value| {
            session.fallback = std.meta.stringToEnum(Fallback, value) orelse blk: {
                system.warn("ELGATE_FALLBACK is \"{s}\"; it may be passthrough, wait or fail. Taken as passthrough", .{value[0..@min(value.len, 64)]});
                break :blk .passthrough;
            };
        }
        var limit_ms: u64 = reconnect_default_ms;
        if (system.environment("ELGATE_RECONNECT_TIMEOUT_MS")) |value| {
            limit_ms = std.fmt.parseInt(u32, value, 10) catch blk: {
                system.warn("ELGATE_RECONNECT_TIMEOUT_MS is \"{s}\"; it must be a number of milliseconds. Taken as {d}", .{ value[0..@min(value.len, 64)], reconnect_default_ms });
                break :blk reconnect_default_ms;
            };
        }
        session.reconnect_limit_ns = limit_ms * std.time.ns_per_ms;
        session.socket_settled = false;
    }

    /// Everything that has to be there once per process, before the first connection.
    fn prepare(session: *Session) error{OutOfMemory}!void {
        if (session.positions_memory == null) {
            session.positions_memory = system.reserve(positions.file_size) orelse return error.OutOfMemory;
        }
        if (session.guard == &static_guard) {
            const page = system.reserve(std.heap.pageSize()) orelse return error.OutOfMemory;
            if (system.failure(linux.madvise(page.ptr, page.len, linux.MADV.WIPEONFORK)) != null) return error.OutOfMemory;
            const guard: *ForkGuard = @ptrCast(page.ptr);
            guard.attached = 1;
            @atomicStore(*ForkGuard, &session.guard, guard, .release);
        }
        if (session.thread_key == null) {
            var key: c_uint = undefined;
            // Without a key rows come back when the kernel marks their mutexes: later, but they do.
            if (pthread_key_create(&key, threadEnded) == 0) session.thread_key = key;
        }
    }

    /// The only thread of a fresh child, or one of those that it has started since.
    fn startAnewInChild(session: *Session) void {
        const guard = session.guard;
        if (@cmpxchgStrong(u32, &guard.attached, 0, 2, .acquire, .acquire)) |seen| {
            if (seen == 1) return;
            while (@atomicLoad(u32, &guard.attached, .acquire) != 1) _ = system.sleepNs(50 * std.time.ns_per_us);
            return;
        }
        session.fork_epoch += 1;
        session.process_id = linux.getpid();
        session.lock.forget();
        session.rows_lock.forget();
        session.free_row_count = 0;
        session.closeControl();
        for (session.rings[0..session.ring_count]) |*known| if (descriptorOf(known)) |fd| system.close(fd);
        // The rings are not mapped here (MADV_DONTFORK): a child must not touch its parent's claims.
        @atomicStore(?*const Ring, &session.ring, null, .release);
        session.ring_count = 0;
        session.gave_up = false;
        const sequence = session.sequence;
        @atomicStore(u32, &session.sequence, sequence + 2 - sequence % 2, .release);
        if (session.state == .connected) session.setState(.lost);
        if (session.listener) |listener| listener.forked();
        @atomicStore(u32, &guard.attached, 1, .release);
    }

    // ---- finding the daemon ------------------------------------------------------------------------------

    /// A session under another sequence than `seen`, or the same if nothing is wrong with it. Waits for the
    /// daemon up to the limit.
    pub fn reconnect(session: *Session, seen: u32) Error!void {
        try session.lock.acquire();
        defer session.lock.release();
        if (session.state == .connected and session.sequence != seen) return;
        if (session.state == .connected) session.drop();
        return session.connectUntilLimit();
    }

    /// Nothing to do while a session is open.
    pub fn ensureConnected(session: *Session) Error!void {
        if (session.currentState() == .connected) return;
        try session.lock.acquire();
        defer session.lock.release();
        if (session.state == .connected) return;
        return session.connectUntilLimit();
    }

    /// One try, no waiting. True: there is a session, this one or another.
    pub fn reconnectAtOnce(session: *Session) bool {
        session.lock.acquire() catch return false;
        defer session.lock.release();
        session.reconnectOnce();
        return session.state == .connected;
    }

    /// One try, no waiting: for an open, which would rather know of a restarted daemon's routes.
    fn reconnectOnce(session: *Session) void {
        if (session.state == .connected and session.controlIsDead()) session.drop();
        if (session.state != .lost) return;
        session.handshake() catch return;
        Counters.add(&session.counters.reconnects, 1);
    }

    fn connectUntilLimit(session: *Session) Error!void {
        if (session.positions_memory == null) return error.Lost;
        const began_ns = system.monotonicNs();
        const limit_ns: u64 = if (session.gave_up) 0 else session.reconnect_limit_ns;
        const is_resumed = began_ns -| session.interrupted_at_ns < resumed_wait_ns_max;
        const deadline_ns = if (is_resumed) session.interrupted_deadline_ns else began_ns + limit_ns;
        var backoff = Backoff{};
        while (true) {
            if (session.handshake()) {
                Counters.add(&session.counters.reconnects, 1);
                return;
            } else |_| {}
            if (session.unserved) switch (session.fallback) {
                // Waiting would not change it. What is in a ring is worth waiting for all the same.
                .passthrough => if (!session.listener.?.has_pending()) {
                    session.goUnserved();
                    return error.Lost;
                },
                .fail => return error.Lost,
                .wait => {},
            };
            if (wait.patience.isOver()) return error.Lost; // this caller's, not the process's
            if (system.monotonicNs() >= deadline_ns) {
                if (!session.gave_up) {
                    system.warn("the daemon at {s} did not come back within {d} ms ({s}); operations on routed files fail with EIO until it does. Start it again with `elgate daemon`", .{ session.socketName(), session.reconnect_limit_ns / std.time.ns_per_ms, @tagName(session.connect_errno) });
                }
                session.gave_up = true;
                return error.Lost;
            }
            if (wait.isEnded(backoff.sleep(@min(deadline_ns, wait.patience.deadline_ns)))) {
                session.interrupted_deadline_ns = deadline_ns;
                session.interrupted_at_ns = system.monotonicNs();
                return error.Interrupted;
            }
        }
    }

    /// As if there were no daemon at the start.
    fn goUnserved(session: *Session) void {
        session.setState(.passthrough);
        if (session.warned_unserved or session.warned_protocol) return;
        session.warned_unserved = true;
        system.warn("the daemon at {s} does not serve uid {d} ({s}); this process goes on without Elgate. Let that user connect (control.group and control.mode, and the socket's directory), give it a daemon of its own, or set ELGATE_FALLBACK=fail", .{ session.socketName(), linux.geteuid(), @tagName(session.connect_errno) });
    }

    /// Whether the daemon's end of the control socket is gone. Called between bounded sleeps.
    pub fn daemonIsGone(session: *Session, seen: u32) bool {
        if (!session.isCurrent(seen)) return false; // somebody has noticed
        if (session.currentState() != .connected) return true;
        return session.controlIsDead();
    }

    fn controlIsDead(session: *Session) bool {
        const fd = @atomicLoad(i32, &session.control_fd, .acquire);
        if (fd < 0 or !session.controlIsOurs(fd)) return true;
        var polled = [1]linux.pollfd{.{ .fd = fd, .events = linux.EPOLL.RDHUP, .revents = 0 }};
        const result = linux.poll(&polled, 1, 0);
        if (system.failure(result) != null) return false;
        return polled[0].revents != 0;
    }

    /// Programs close descriptors that they do not know, and the number may be another's by now.
    fn controlIsOurs(session: *Session, fd: i32) bool {
        const status = system.fileStatus(fd) orelse return false;
        return status.isSocket() and status.inode == @atomicLoad(u64, &session.control_inode, .acquire);
    }

    pub fn ownsDescriptor(session: *Session, fd: i32) bool {
        if (fd < 0) return false;
        if (fd == @atomicLoad(i32, &session.control_fd, .acquire)) return true;
        const current = session.currentRing() orelse return false;
        return fd == @atomicLoad(i32, &current.fd, .acquire);
    }

    /// The program is about to close a descriptor of ours: keep it under another number.
    pub fn moveDescriptor(session: *Session, fd: i32) void {
        session.lock.acquire() catch return;
        defer session.lock.release();
        const result = linux.fcntl(fd, F_DUPFD_CLOEXEC, descriptor_floor);
        if (system.failure(result) != null) return;
        const moved: i32 = @intCast(result);
        if (fd == session.control_fd) return @atomicStore(i32, &session.control_fd, moved, .release);
        for (session.rings[0..session.ring_count]) |*known| {
            if (known.fd == fd) return @atomicStore(i32, &known.fd, moved, .release);
        }
        system.close(moved);
    }

    /// The ring's descriptor, if it still is what it was.
    fn descriptorOf(known: *const Ring) ?i32 {
        const status = system.fileStatus(known.fd) orelse return null;
        return if (status.isRegular() and status.inode == known.inode) known.fd else null;
    }

    fn closeControl(session: *Session) void {
        const fd = session.control_fd;
        if (fd >= 0 and session.controlIsOurs(fd)) system.close(fd);
        @atomicStore(i32, &session.control_fd, -1, .release);
    }

    /// The session is over. What was learned in it is void from here on; the mappings stay.
    fn drop(session: *Session) void {
        // First: an operation that still saw the old sequence after its claim stands below the head that the
        // daemon reads when it notices the hang-up.
        _ = @atomicRmw(u32, &session.sequence, .Add, 2, .seq_cst);
        session.closeControl();
        if (session.state == .connected) session.setState(.lost);
    }

    fn setState(session: *Session, state: State) void {
        @atomicStore(State, &session.state, state, .release);
    }

    fn socketName(session: *Session) []const u8 {
        return session.socket_path[0..session.socket_path_length];
    }

    // ---- handshake ---------------------------------------------------------------------------------------

    fn handshake(session: *Session) error{Failed}!void {
        session.connect_errno = .CONNREFUSED;
        session.unserved = false;
        const fd = session.connect() orelse {
            session.unserved = session.connect_errno == .ACCES or session.connect_errno == .PERM;
            return error.Failed;
        };
        var status_known = false;
        if (system.fileStatus(fd)) |status| {
            @atomicStore(u64, &session.control_inode, status.inode, .release);
            status_known = true;
        }
        @atomicStore(i32, &session.control_fd, fd, .release);
        errdefer session.closeControl();
        if (!status_known) return error.Failed;

        var hello = std.mem.zeroes(control.Hello);
        hello.process_id = @bitCast(linux.getpid());
        hello.ring_version = ring.version;
        hello.positions_version = positions.version;
        hello.routes_version = routes.version;
        hello.runtime = session.runtime;
        const previous = if (session.ring) |current| descriptorOf(current) else null;
        var descriptors: [control.descriptors_max]i32 = undefined;
        var refusal: Refusal = undefined;
        const welcome = session.exchange(control.Hello, &hello, .hello, if (previous) |known| &.{known} else &.{}, control.Welcome, .welcome, &descriptors, &refusal) catch |err| {
            session.connect_errno = .PROTO;
            switch (err) {
                error.Refused => {
                    session.connect_errno = if (refusal.errno > 0 and refusal.errno < 4096) @enumFromInt(refusal.errno) else .CONNREFUSED;
                    session.unserved = refusal.reason == .wrong_user;
                    // The ring that we had is just being given up: it is there again, or another one, in a moment.
                    if (refusal.reason != .stopping) session.warnProtocol("refused this process ({s}){s}", .{ refusalName(refusal), if (session.session_id == 0 and session.fallback == .passthrough) "; it goes on without Elgate" else "" });
                },
                // After a first session, a daemon that ends in the middle of a word was killed once more.
                error.Lost => if (session.session_id == 0) session.warnProtocol("closed the connection, did not answer within {d} ms, or answered what makes no sense; is it of another version?", .{answer_timeout_ms}),
                error.HeldByThisThread, error.Interrupted => {},
            }
            return error.Failed;
        };
        defer for (descriptors) |descriptor| system.close(descriptor);
        session.install(&welcome, descriptors) catch |err| {
            session.connect_errno = if (err == error.OutOfMemory) .NOMEM else .PROTO;
            session.warnProtocol("sent what cannot be used ({s}); is it of another version?", .{@errorName(err)});
            return error.Failed;
        };
    }

    fn warnProtocol(session: *Session, comptime what: []const u8, arguments: anytype) void {
        if (session.warned_protocol) return;
        session.warned_protocol = true;
        var buffer: [256]u8 = undefined;
        const text = std.fmt.bufPrint(&buffer, what, arguments) catch what;
        system.warn("the daemon at {s} {s}", .{ session.socketName(), text });
    }

    /// In the order in which a daemon is looked for. After the first connection: only where it was.
    fn connect(session: *Session) ?i32 {
        if (session.socket_settled) return session.connectTo(session.socketName());
        if (system.environment("ELGATE_SOCKET")) |path| return session.connectTo(path);
        var buffer: [256]u8 = undefined;
        if (system.environment("XDG_RUNTIME_DIR")) |directory| {
            if (std.fmt.bufPrint(&buffer, "{s}/elgate/control.sock", .{directory})) |path| {
                if (session.connectTo(path)) |fd| return fd;
            } else |_| {}
        }
        const uid = linux.geteuid();
        if (uid != 0) {
            // Where a user's own daemon listens; the last one where there is no login manager.
            const path = std.fmt.bufPrint(&buffer, "/run/user/{d}/elgate/control.sock", .{uid}) catch unreachable;
            if (session.connectTo(path)) |fd| return fd;
            const last = std.fmt.bufPrint(&buffer, "/tmp/elgate-{d}/control.sock", .{uid}) catch unreachable;
            if (session.connectTo(last)) |fd| return fd;
        }
        return session.connectTo("/run/elgate/control.sock");
    }

    fn connectTo(session: *Session, path: []const u8) ?i32 {
        var address = linux.sockaddr.un{ .path = @splat(0) };
        const kept = path[0..@min(path.len, session.socket_path.len)];
        if (path.ptr != &session.socket_path) @memcpy(session.socket_path[0..kept.len], kept);
        session.socket_path_length = @intCast(kept.len);
        if (path.len > socket_path_bytes_max) {
            session.connect_errno = .NAMETOOLONG;
            return null;
        }
        @memcpy(address.path[0..path.len], session.socket_path[0..path.len]);

        const made = linux.socket(linux.AF.UNIX, linux.SOCK.SEQPACKET | linux.SOCK.CLOEXEC, 0);
        if (system.failure(made)) |errno| {
            session.connect_errno = errno;
            return null;
        }
        const fd = system.moveUp(@intCast(made), descriptor_floor);
        const timeout = linux.timeval{ .sec = answer_timeout_ms / 1000, .usec = 0 };
        _ = linux.setsockopt(fd, linux.SOL.SOCKET, linux.SO.RCVTIMEO, std.mem.asBytes(&timeout), @sizeOf(linux.timeval));
        _ = linux.setsockopt(fd, linux.SOL.SOCKET, linux.SO.SNDTIMEO, std.mem.asBytes(&timeout), @sizeOf(linux.timeval));
        while (true) {
            const errno = system.failure(linux.connect(fd, &address, @sizeOf(linux.sockaddr.un))) orelse {
                if (!listensForUs(fd)) {
                    session.connect_errno = .PERM;
                    system.close(fd);
                    return null;
                }
                session.socket_settled = true;
                return fd;
            };
            if (errno == .INTR) continue;
            session.connect_errno = errno;
            system.close(fd);
            return null;
        }
    }

    /// The daemon gets our files: it must be this user's or root's, whoever owns the path.
    fn listensForUs(fd: i32) bool {
        var peer: extern struct { pid: i32, uid: u32, gid: u32 } = undefined;
        var length: linux.socklen_t = @sizeOf(@TypeOf(peer));
        if (system.failure(linux.getsockopt(fd, linux.SOL.SOCKET, linux.SO.PEERCRED, std.mem.asBytes(&peer), &length)) != null) return false;
        return peer.uid == 0 or peer.uid == linux.geteuid();
    }

    const InstallError = error{ RingUnusable, PositionsUnusable, RouteTableUnusable, TooManyRings, OutOfMemory };

    fn install(session: *Session, welcome: *const control.Welcome, descriptors: [control.descriptors_max]i32) InstallError!void {
        const table = try mapTable(descriptors[2], welcome.routes_bytes);
        errdefer unmap(table.memory);
        if (welcome.positions_bytes != positions.file_size or !hasSize(descriptors[1], positions.file_size)) return error.PositionsUnusable;
        try checkPositions(descriptors[1], welcome.daemon_epoch);
        const old = session.ring;
        const new = session.findRing(welcome.ring_uuid) orelse try session.mapRing(descriptors[0], welcome);

        _ = @atomicRmw(u32, &session.sequence, .Add, 1, .seq_cst);
        session.listener.?.session_replaced();
        if (old) |replaced| if (replaced != new) session.listener.?.ring_replaced(replaced);
        const memory = session.positions_memory.?;
        const over = linux.mmap(memory.ptr, memory.len, linux.PROT.READ, .{ .TYPE = .SHARED, .FIXED = true }, descriptors[1], 0);
        const failed = system.failure(over) != null;
        if (failed) {
            // The old mapping may be gone. Zeros say that nothing is done: wrong for nobody, and no hole.
            _ = linux.mmap(memory.ptr, memory.len, linux.PROT.READ, .{ .TYPE = .PRIVATE, .ANONYMOUS = true, .FIXED = true }, -1, 0);
        } else {
            @atomicStore(?*const Ring, &session.ring, new, .seq_cst);
            session.session_id = welcome.session;
            session.serves_test_stub = welcome.test_stub != 0;
            session.lease = ring.lease(welcome.daemon_epoch, welcome.session);
            @atomicStore(u32, &session.mapped_sequence, session.sequence + 1, .seq_cst);
            session.gave_up = false;
            session.setState(.connected);
        }
        _ = @atomicRmw(u32, &session.sequence, .Add, 1, .seq_cst);
        if (failed) return error.OutOfMemory;
        session.replaceTable(table);
    }

    /// In this order: a fork in between leaves the child a table that is there.
    fn replaceTable(session: *Session, table: routes.Table) void {
        const before = session.table;
        session.table = table;
        if (before) |old| unmap(old.memory);
    }

    fn findRing(session: *Session, uuid: [16]u8) ?*const Ring {
        for (session.rings[0..session.ring_count]) |*known| {
            if (std.mem.eql(u8, &known.uuid, &uuid)) return known;
        }
        return null;
    }

    fn mapRing(session: *Session, fd: i32, welcome: *const control.Welcome) InstallError!*const Ring {
        if (session.ring_count == rings_max) return error.TooManyRings;
        if (welcome.ring_bytes != ring.file_size or !hasSize(fd, ring.file_size)) return error.RingUnusable;
        const result = linux.mmap(null, ring.file_size, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED }, fd, 0);
        if (system.failure(result) != null) return error.OutOfMemory;
        const memory = @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(result))[0..ring.file_size];
        errdefer unmap(memory);
        const header: *const ring.Header = @ptrCast(memory.ptr);
        if (@atomicLoad(u32, &header.version, .acquire) != ring.version or header.magic != ring.magic) return error.RingUnusable;
        if (header.slot_count != ring.slot_count or header.slot_size != ring.slot_size) return error.RingUnusable;
        if (header.producer_rows != ring.producer_rows) return error.RingUnusable;
        if (!std.mem.eql(u8, &header.uuid, &welcome.ring_uuid)) return error.RingUnusable;
        // A child that was forked in the middle of a copy must not go on with it.
        if (system.failure(linux.madvise(memory.ptr, memory.len, linux.MADV.DONTFORK)) != null) return error.OutOfMemory;
        const new = &session.rings[session.ring_count];
        session.ring_count += 1;
        const kept = linux.fcntl(fd, F_DUPFD_CLOEXEC, descriptor_floor);
        new.* = .{
            .view = .{ .memory = memory },
            .uuid = welcome.ring_uuid,
            .ordinal = @intCast(session.ring_count),
            .fd = if (system.failure(kept) == null) @intCast(kept) else -1,
            .inode = if (system.fileStatus(fd)) |status| status.inode else 0,
            .is_named = if (system.fileStatus(fd)) |status| status.links > 0 else false,
        };
        return new;
    }

    fn checkPositions(fd: i32, daemon_epoch: u64) InstallError!void {
        const page = std.heap.pageSize();
        const result = linux.mmap(null, page, linux.PROT.READ, .{ .TYPE = .SHARED }, fd, 0);
        if (system.failure(result) != null) return error.OutOfMemory;
        const memory = @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(result))[0..page];
        defer unmap(memory);
        const header: *const positions.Header = @ptrCast(memory.ptr);
        if (header.magic != positions.magic or header.version != positions.version) return error.PositionsUnusable;
        if (header.daemon_epoch != daemon_epoch) return error.PositionsUnusable;
    }

    fn mapTable(fd: i32, bytes: u64) InstallError!routes.Table {
        if (bytes < @sizeOf(routes.TableHeader) or bytes > routes.table_bytes_max) return error.RouteTableUnusable;
        if (!hasSize(fd, bytes)) return error.RouteTableUnusable;
        const result = linux.mmap(null, bytes, linux.PROT.READ, .{ .TYPE = .SHARED }, fd, 0);
        if (system.failure(result) != null) return error.OutOfMemory;
        const memory = @as([*]align(std.heap.page_size_min) const u8, @ptrFromInt(result))[0..bytes];
        errdefer unmap(memory);
        const table = routes.Table.init(memory) catch return error.RouteTableUnusable;
        for (0..table.header().count) |index| {
            const entry = table.entry(@intCast(index));
            if (entry.route >= positions.routes_max) return error.RouteTableUnusable;
            if (entry.name_length == 0 or entry.name_length > routes.name_bytes_max) return error.RouteTableUnusable;
        }
        return table;
    }

    fn hasSize(fd: i32, bytes: u64) bool {
        const status = system.fileStatus(fd) orelse return false;
        return status.isRegular() and status.size_bytes == bytes;
    }

    fn unmap(memory: []const u8) void {
        _ = linux.munmap(memory.ptr, memory.len);
    }

    // ---- asking --------------------------------------------------------------------------------------------

    /// The row of this thread, lent in the session `wanted`. False: that session is over.
    pub fn attachThread(session: *Session, thread: *Thread, wanted: u32, refusal: *Refusal) Error!bool {
        if (thread.row != thread_module.no_row and thread.hasOpenClaim()) {
            // A handler within an open claim: the claim's row stays locked until it is closed.
            return error.Lost;
        }
        try session.lock.acquire();
        defer session.lock.release();
        if (session.state != .connected or session.sequence != wanted) return false;
        const lent = session.ring.?;
        for (0..4) |_| {
            const row = session.takeFreeRow() orelse blk: {
                var request = std.mem.zeroes(control.AttachThread);
                request.thread_id = @bitCast(linux.gettid());
                const answer = try session.exchange(control.AttachThread, &request, .attach_thread, &.{}, control.ThreadAttached, .thread_attached, &.{}, refusal);
                break :blk answer.row;
            };
            if (row >= ring.producer_rows) {
                session.drop();
                return error.Lost;
            }
            const entry = lent.view.producerRow(row);
            if (!lockRow(entry)) continue;
            @atomicStore(u32, &entry.thread_id, @bitCast(linux.gettid()), .monotonic);
            @atomicStore(u64, &entry.open_claim, 0, .monotonic);
            session.giveRowBack(thread);
            thread.ring = lent;
            thread.row = row;
            thread.sequence = wanted;
            thread.allowed_below = 0;
            thread.lease = session.lease;
            if (@atomicLoad(u64, &entry.session, .seq_cst) != session.lease) {
                // The daemon has taken all rows back: it is another one, or this session is over for it.
                _ = pthread_mutex_unlock(&entry.mutex);
                thread.row = thread_module.no_row;
                session.drop();
                return error.Lost;
            }
            if (session.thread_key) |key| _ = pthread_setspecific(key, thread);
            return true;
        }
        // Rows that are not free, again and again: this daemon is confused.
        session.drop();
        return error.Lost;
    }

    /// Gives the row of the calling thread back. No operation of it is open.
    pub fn detachThread(session: *Session, thread: *Thread) void {
        session.giveRowBack(thread);
    }

    fn giveRowBack(session: *Session, thread: *Thread) void {
        if (thread.row == thread_module.no_row) return;
        const row = thread.row;
        const entry = thread.ring.?.view.producerRow(row);
        const sequence = thread.sequence;
        const leased = @atomicLoad(u64, &entry.session, .seq_cst) == thread.lease;
        thread.row = thread_module.no_row;
        _ = pthread_mutex_unlock(&entry.mutex);
        // Only a row that is still lent to this session goes to the next thread of this process.
        if (!leased) return;
        session.rows_lock.acquire() catch return;
        defer session.rows_lock.release();
        if (!session.isCurrent(sequence)) return;
        if (session.free_rows_sequence != sequence) {
            session.free_rows_sequence = sequence;
            session.free_row_count = 0;
        }
        if (session.free_row_count == session.free_rows.len) return;
        session.free_rows[session.free_row_count] = @intCast(row);
        session.free_row_count += 1;
    }

    fn takeFreeRow(session: *Session) ?u32 {
        session.rows_lock.acquire() catch return null;
        defer session.rows_lock.release();
        if (session.free_rows_sequence != session.sequence or session.free_row_count == 0) return null;
        session.free_row_count -= 1;
        return session.free_rows[session.free_row_count];
    }

    /// The route of `name` in the current session decides; the daemon looks itself whether the file is on it.
    pub fn registerFile(session: *Session, fd: i32, name: *const RouteName, former_file_id: u64, refusal: *Refusal) Error!Registration {
        try session.lock.acquire();
        defer session.lock.release();
        if (session.state != .connected) return error.Lost;
        try session.refreshTable();
        // A daemon that knows the file may take it back though its route is gone from the configuration.
        const matched_flags = if (session.findRoute(name.text())) |entry| entry.flags else null;
        var request = std.mem.zeroes(control.RegisterFile);
        request.former_file_id = former_file_id;
        const answer = try session.exchange(control.RegisterFile, &request, .register_file, &.{fd}, control.FileRegistered, .file_registered, &.{}, refusal);
        if (answer.handle >= positions.handles_max or answer.route >= positions.routes_max) {
            session.drop();
            return error.Lost;
        }
        Counters.add(&session.counters.registrations, 1);
        const view = positions.View{ .memory = session.positions_memory.? };
        const handle = view.handle(answer.handle);
        const error_sequence = @atomicLoad(u32, &handle.error_sequence, .acquire);
        // The daemon clears the errno of a handle when it gives it out: one that stands there is ours.
        const clean = @atomicLoad(i32, &handle.error_errno, .acquire) == 0;
        return .{
            .sequence = session.sequence,
            .route = answer.route,
            .handle = answer.handle,
            .file_id = answer.file_id,
            .flags = session.flagsOf(answer.route) orelse matched_flags,
            .error_baseline = if (clean) error_sequence else error_sequence -% 1,
        };
    }

    pub fn releaseFile(session: *Session, sequence: u32, file_id: u64, handle: u32) Error!void {
        try session.lock.acquire();
        defer session.lock.release();
        if (session.state != .connected or session.sequence != sequence) return; // released with its session
        var request = std.mem.zeroes(control.ReleaseFile);
        request.file_id = file_id;
        request.handle = handle;
        var refusal: Refusal = undefined;
        _ = try session.exchange(control.ReleaseFile, &request, .release_file, &.{}, control.Done, .file_released, &.{}, &refusal);
    }

    pub fn fenceFile(session: *Session, sequence: u32, file_id: u64, handle: u32, reason: u32, refusal: *Refusal) Error!void {
        try session.lock.acquire();
        defer session.lock.release();
        if (session.state != .connected or session.sequence != sequence) return error.Lost;
        var request = std.mem.zeroes(control.FenceFile);
        request.file_id = file_id;
        request.handle = handle;
        request.reason = reason;
        _ = try session.exchange(control.FenceFile, &request, .fence_file, &.{}, control.Done, .file_fenced, &.{}, refusal);
    }

    /// What every process has written to the file behind `fd`, and whose write has returned, is in it.
    pub fn drainFile(session: *Session, fd: i32, refusal: *Refusal) Error!void {
        try session.lock.acquire();
        defer session.lock.release();
        if (session.state != .connected) return error.Lost;
        var request = std.mem.zeroes(control.DrainFile);
        _ = try session.exchange(control.DrainFile, &request, .drain_file, &.{fd}, control.Done, .file_drained, &.{}, refusal);
    }

    /// The log knows of it. `passed`: the file or directory, and where it gets another name, that one's directory.
    pub fn changeName(session: *Session, change: control.NameChange, passed: []const i32, name: []const u8, refusal: *Refusal) Error!void {
        try session.lock.acquire();
        defer session.lock.release();
        if (session.state != .connected) return error.Lost;
        var request = std.mem.zeroes(control.ChangeName);
        request.change = change;
        request.name_length = @intCast(name.len);
        @memcpy(request.name[0..name.len], name);
        _ = try session.exchange(control.ChangeName, &request, .change_name, passed, control.Done, .name_noted, &.{}, refusal);
    }

    /// Whether a route's files may lie below a directory, by what stands before the first wildcard.
    pub fn mayMatchBelow(session: *Session, directory: []const u8) bool {
        session.lock.acquire() catch return false;
        defer session.lock.release();
        const table = session.table orelse return false;
        for (0..table.header().count) |index| {
            const pattern = table.pattern(table.entry(@intCast(index)));
            const literal = pattern[0 .. std.mem.indexOfAny(u8, pattern, routes.wildcards) orelse pattern.len];
            const common = @min(literal.len, directory.len);
            if (std.mem.eql(u8, literal[0..common], directory[0..common])) return true;
        }
        return false;
    }

    /// The route that an absolute, symlink-free path is on.
    pub fn match(session: *Session, path: []const u8) ?Match {
        session.lock.acquire() catch return null;
        defer session.lock.release();
        session.reconnectOnce();
        session.refreshTable() catch {};
        const table = session.table orelse return null;
        const entry = table.match(path) orelse return null;
        var found = Match{ .name = .{}, .flags = entry.flags };
        const name = table.name(entry);
        @memcpy(found.name.bytes[0..name.len], name);
        found.name.length = @intCast(name.len);
        return found;
    }

    pub fn hasTable(session: *Session) bool {
        return session.table != null;
    }

    fn findRoute(session: *Session, name: []const u8) ?*const routes.Entry {
        const table = session.table orelse return null;
        for (0..table.header().count) |index| {
            const entry = table.entry(@intCast(index));
            if (std.mem.eql(u8, table.name(entry), name)) return entry;
        }
        return null;
    }

    fn flagsOf(session: *Session, route: u32) ?routes.Flags {
        const table = session.table orelse return null;
        for (0..table.header().count) |index| {
            const entry = table.entry(@intCast(index));
            if (entry.route == route) return entry.flags;
        }
        return null;
    }

    fn refreshTable(session: *Session) Error!void {
        if (session.state != .connected) return;
        const view = positions.View{ .memory = session.positions_memory.? };
        const generation = @atomicLoad(u32, &view.header().routes_generation, .acquire);
        if (session.table) |table| if (table.header().generation == generation) return;
        var request = std.mem.zeroes(control.FetchRoutes);
        var descriptors: [1]i32 = undefined;
        var refusal: Refusal = undefined;
        const answer = session.exchange(control.FetchRoutes, &request, .fetch_routes, &.{}, control.Routes, .routes, &descriptors, &refusal) catch |err| {
            // Refused: the table before stays in force. Not what somebody else asked for was refused.
            if (err == error.Refused) return;
            return err;
        };
        defer system.close(descriptors[0]);
        const table = mapTable(descriptors[0], answer.routes_bytes) catch |err| {
            session.warnProtocol("sent a route table that cannot be used ({s}); the one before stays in force", .{@errorName(err)});
            return;
        };
        session.replaceTable(table);
    }

    // ---- one message there, one back -----------------------------------------------------------------------

    /// `descriptors` are filled with just as many as it has room for; an answer with another number is wrong. On
    /// any error but Refused the session is lost.
    fn exchange(
        session: *Session,
        comptime Request: type,
        request: *Request,
        kind: control.Kind,
        passed: []const i32,
        comptime Answer: type,
        answer_kind: control.Kind,
        descriptors: []i32,
        refusal: *Refusal,
    ) Error!Answer {
        comptime assert(@offsetOf(Request, "header") == 0 and @offsetOf(Answer, "header") == 0);
        session.message_sequence +%= 1;
        request.header = .{
            .magic = control.magic,
            .version = control.version,
            .kind = @intFromEnum(kind),
            .length_bytes = @sizeOf(Request),
            .sequence = session.message_sequence,
        };
        var received: Received = .{};
        session.converse(std.mem.asBytes(request), passed, &received, session.patienceNs(kind)) catch {
            received.closeAll();
            session.drop();
            return error.Lost;
        };
        const header: *const control.MessageHeader = @ptrCast(&received.bytes);
        const sound = received.length >= @sizeOf(control.MessageHeader) and header.magic == control.magic and
            header.version == control.version and header.length_bytes == received.length and
            header.sequence == session.message_sequence;
        if (sound and header.kind == @intFromEnum(control.Kind.refused) and received.length == @sizeOf(control.Refused) and received.descriptor_count == 0) {
            const refused: *const control.Refused = @ptrCast(&received.bytes);
            refusal.* = .{ .reason = refused.refusal, .errno = refused.errno };
            return error.Refused;
        }
        if (!sound or header.kind != @intFromEnum(answer_kind) or received.length != @sizeOf(Answer) or received.descriptor_count != descriptors.len) {
            received.closeAll();
            session.drop();
            return error.Lost;
        }
        @memcpy(descriptors, received.descriptors[0..received.descriptor_count]);
        const answer: *const Answer = @ptrCast(&received.bytes);
        return answer.*;
    }

    const Received = struct {
        bytes: [control.message_bytes_max]u8 align(8) = undefined,
        length: usize = 0,
        descriptors: [descriptors_room]i32 = undefined,
        descriptor_count: usize = 0,

        fn closeAll(received: *Received) void {
            for (received.descriptors[0..received.descriptor_count]) |descriptor| system.close(descriptor);
            received.descriptor_count = 0;
        }
    };

    /// More than any answer carries, so that surplus ones are seen and closed; the kernel closes what is beyond.
    const descriptors_room = 8;

    const ControlHeader = extern struct { length: usize, level: i32, kind: i32 };
    const SCM_RIGHTS = 1;

    /// How long an answer may take. What the daemon must sync to the disk first may take as long as the disk.
    fn patienceNs(session: *const Session, kind: control.Kind) u64 {
        const short: u64 = answer_timeout_ms * std.time.ns_per_ms;
        return switch (kind) {
            .register_file, .release_file, .fence_file, .drain_file, .change_name => @max(short, session.reconnect_limit_ns),
            else => short,
        };
    }

    fn converse(session: *Session, request: []const u8, passed: []const i32, received: *Received, patience_ns: u64) error{Broken}!void {
        const socket = session.control_fd;
        if (socket < 0 or !session.controlIsOurs(socket)) return error.Broken;

        var out = extern struct { header: ControlHeader, descriptors: [control.descriptors_max + 1]i32 }{
            .header = .{ .length = @sizeOf(ControlHeader) + passed.len * @sizeOf(i32), .level = linux.SOL.SOCKET, .kind = SCM_RIGHTS },
            .descriptors = @splat(-1),
        };
        @memcpy(out.descriptors[0..passed.len], passed);
        const out_vector = [1]std.posix.iovec_const{.{ .base = request.ptr, .len = request.len }};
        const out_message = linux.msghdr_const{
            .name = null,
            .namelen = 0,
            .iov = &out_vector,
            .iovlen = 1,
            .control = if (passed.len == 0) null else &out,
            .controllen = if (passed.len == 0) 0 else std.mem.alignForward(usize, out.header.length, @sizeOf(usize)),
            .flags = 0,
        };
        while (true) {
            const sent = linux.sendmsg(socket, &out_message, linux.MSG.NOSIGNAL);
            const errno = system.failure(sent) orelse break;
            if (errno != .INTR) return error.Broken;
        }

        var in: extern struct { header: ControlHeader, descriptors: [descriptors_room]i32 } = undefined;
        var in_vector = [1]std.posix.iovec{.{ .base = &received.bytes, .len = received.bytes.len }};
        var in_message = linux.msghdr{
            .name = null,
            .namelen = 0,
            .iov = &in_vector,
            .iovlen = 1,
            .control = &in,
            .controllen = @sizeOf(@TypeOf(in)),
            .flags = 0,
        };
        const deadline_ns = @min(system.monotonicNs() + patience_ns, wait.patience.deadline_ns);
        const length = while (true) {
            const result = linux.recvmsg(socket, &in_message, linux.MSG.CMSG_CLOEXEC);
            const errno = system.failure(result) orelse break result;
            if (errno != .INTR and errno != .AGAIN) return error.Broken; // AGAIN: SO_RCVTIMEO ran out
            if (system.monotonicNs() >= deadline_ns) return error.Broken;
        };
        if (in_message.controllen >= @sizeOf(ControlHeader) and in.header.level == linux.SOL.SOCKET and in.header.kind == SCM_RIGHTS) {
            const bytes = in.header.length -| @sizeOf(ControlHeader);
            received.descriptor_count = @min(bytes / @sizeOf(i32), descriptors_room);
            @memcpy(received.descriptors[0..received.descriptor_count], in.descriptors[0..received.descriptor_count]);
        }
        received.length = length;
        if (in_message.flags & (linux.MSG.TRUNC | linux.MSG.CTRUNC) != 0) return error.Broken;
    }
};

/// The one session of this process.
pub var process: Session = .{};

pub fn refusalName(refusal: Refusal) []const u8 {
    if (refusal.reason == .limit_reached and (refusal.errno == @intFromEnum(E.MFILE) or refusal.errno == @intFromEnum(E.AGAIN)))
        return "the daemon is out of file descriptors: raise its RLIMIT_NOFILE";
    if (refusal.reason == .limit_reached and refusal.errno == @intFromEnum(E.USERS))
        return "it serves as many rings as it can: one for each user, or, with ring.isolation: per_client, for each client";
    return switch (refusal.reason) {
        .bad_message => "it did not understand the message",
        .version_mismatch => "it is of another version",
        .out_of_order => "it expected another message",
        .not_a_regular_file => "not a regular file",
        .several_links => "the file has several names",
        .not_open_for_writing => "not open for writing",
        .not_on_a_route => "not on a route",
        .no_attribute => "the file system takes no user extended attributes",
        .cannot_reopen => "the daemon cannot open the file itself",
        .limit_reached => "a limit of the daemon is reached",
        .unknown_handle => "it does not know the handle",
        .log_failed => "its log has failed",
        .wrong_user => "this user may not use it",
        .stopping => "it is stopping",
        .target_failed => "the file system refused to mark or sync the file",
        .no_name => "the file has no name any more",
        _ => "for a reason that this client does not know",
    };
}

const F_DUPFD_CLOEXEC = 1030;

extern "c" fn pthread_mutex_trylock(mutex: *anyopaque) c_int;
extern "c" fn pthread_mutex_unlock(mutex: *anyopaque) c_int;
extern "c" fn pthread_mutex_consistent(mutex: *anyopaque) c_int;
extern "c" fn pthread_key_create(key: *c_uint, destructor: ?*const fn (*anyopaque) callconv(.c) void) c_int;
extern "c" fn pthread_setspecific(key: c_uint, value: ?*const anyopaque) c_int;

/// Never waits: a row that is lent to this thread is free.
fn lockRow(entry: *ring.ProducerRow) bool {
    const result = pthread_mutex_trylock(&entry.mutex);
    if (result == 0) return true;
    if (result == @intFromEnum(E.OWNERDEAD)) {
        // Its last owner died with it, perhaps with a claim that the daemon has not given up yet: take another.
        _ = pthread_mutex_consistent(&entry.mutex);
        _ = pthread_mutex_unlock(&entry.mutex);
    }
    return false;
}

/// Called by the C library when a thread that had a row ends. Its claims, if a handler jumped out of any, go
/// with it.
fn threadEnded(_: *anyopaque) callconv(.c) void {
    process.checkFork();
    const thread = thread_module.current(process.fork_epoch);
    if (thread.row == thread_module.no_row) return;
    const producer = @import("producer.zig");
    for (thread.operations[0..thread.depth]) |operation| {
        if (operation.opening != 0) _ = producer.abort(thread.ring.?.view, thread.row, operation.opening - 1);
    }
    thread.depth = 0;
    process.detachThread(thread);
}
