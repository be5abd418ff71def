//! libelgate_bench.so: the loops of `elgate bench`, in native code so that what is measured is Elgate and the
//! disk, not an interpreter. The client's functions come from the installed libelgate_client.so (loaded first,
//! RTLD_GLOBAL); of Elgate itself only the log is compiled in here, to be replayed alone.
//!
//! Each loop fills `samples_ns` with one duration per operation (or per block of operations where that is
//! said), until `samples` are full or CLOCK_MONOTONIC has reached `until_ns`, and returns how many it filled, or
//! -errno.

const std = @import("std");
const linux = std.os.linux;
const os = @import("engine/os.zig");
const wal = @import("format/wal.zig");
const log_module = @import("engine/wal/log.zig");

extern "c" fn elgate_write(fd: c_int, buffer: [*]const u8, length_bytes: usize) i64;
extern "c" fn elgate_fsync(fd: c_int) c_int;
extern "c" fn elgate_append(fd: c_int, buffer: [*]const u8, length_bytes: usize, ticket: *u64) c_int;
extern "c" fn elgate_wait(fd: c_int, ticket: u64, level: c_int, timeout_ms: i64) c_int;

const level_durable = 2;
const level_applied = 3;
const payload_max = 1 << 20;
const block_size = 4096;

var payload: [payload_max]u8 align(block_size) = @splat('e');

fn failed(errno: i32) i64 {
    return -@as(i64, errno);
}

/// Accept alone: claim, copy, commit. One sample per block of `block` operations (its mean), so that the clock is
/// not what is measured; between blocks the ring is let drain, so that no sample waits for space.
export fn elgate_bench_accept(fd: c_int, length_bytes: usize, block: u32, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    var ticket: u64 = 0;
    for (0..samples) |i| {
        const start = os.monotonicNs();
        if (start >= until_ns) return @intCast(i);
        for (0..block) |_| {
            const result = elgate_append(fd, &payload, length_bytes, &ticket);
            if (result < 0) return result;
        }
        samples_ns[i] = (os.monotonicNs() - start) / block;
        const waited = elgate_wait(fd, ticket, level_applied, -1);
        if (waited < 0) return waited;
    }
    return @intCast(samples);
}

/// write() to the page cache, the same way: the native peer of an accept.
export fn elgate_bench_page_cache(fd: c_int, length_bytes: usize, block: u32, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    for (0..samples) |i| {
        const start = os.monotonicNs();
        if (start >= until_ns) return @intCast(i);
        for (0..block) |_| {
            switch (os.check(linux.write(fd, &payload, length_bytes))) {
                .value => {},
                .errno => |errno| return failed(errno),
            }
        }
        samples_ns[i] = (os.monotonicNs() - start) / block;
    }
    return @intCast(samples);
}

/// One record after the other, each waited for until it is durable.
export fn elgate_bench_durable(fd: c_int, length_bytes: usize, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    for (0..samples) |i| {
        const start = os.monotonicNs();
        if (start >= until_ns) return @intCast(i);
        var ticket: u64 = 0;
        const result = elgate_append(fd, &payload, length_bytes, &ticket);
        if (result < 0) return result;
        const waited = elgate_wait(fd, ticket, level_durable, -1);
        if (waited < 0) return waited;
        samples_ns[i] = os.monotonicNs() - start;
    }
    return @intCast(samples);
}

/// Records made at a steady pace by one thread that waits for none of them; this one waits, and says of each when it has
/// reached `level`. A sample begins when its record was due; several that are due are made one after the other.
export fn elgate_bench_paced(fd: c_int, length_bytes: usize, level: c_int, interval_ns: u64, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    const tickets = std.heap.c_allocator.alloc(u64, samples) catch return failed(@intFromEnum(linux.E.NOMEM));
    defer std.heap.c_allocator.free(tickets);
    var maker = Maker{ .fd = fd, .length_bytes = length_bytes, .interval_ns = interval_ns, .due_ns = samples_ns[0..samples], .tickets = tickets, .until_ns = until_ns };
    const thread = std.Thread.spawn(.{}, Maker.run, .{&maker}) catch return failed(@intFromEnum(linux.E.AGAIN));
    defer thread.join();
    var done: u32 = 0;
    while (true) {
        const made = maker.awaitMore(done) orelse break;
        const waited = elgate_wait(fd, tickets[done], level, -1);
        if (waited < 0) return maker.abandon(waited);
        // Those behind it that have reached it together with it.
        while (true) {
            samples_ns[done] = os.monotonicNs() - samples_ns[done];
            done += 1;
            if (done == made or elgate_wait(fd, tickets[done], level, 0) < 0) break;
        }
    }
    return if (maker.failure < 0) maker.failure else done;
}

const Maker = struct {
    fd: c_int,
    length_bytes: usize,
    interval_ns: u64,
    /// Of each record, when it was due; and its ticket.
    due_ns: []u64,
    tickets: []u64,
    until_ns: u64,
    /// How many of them there are. A futex.
    made: std.atomic.Value(u32) = .init(0),
    ended: std.atomic.Value(bool) = .init(false),
    abandoned: std.atomic.Value(bool) = .init(false),
    failure: i64 = 0,

    fn run(maker: *Maker) void {
        maker.failure = maker.make();
        maker.ended.store(true, .release);
        maker.tell(maker.made.load(.monotonic));
    }

    fn make(maker: *Maker) i64 {
        // Else the kernel may let this thread sleep 50 µs longer than asked.
        _ = linux.prctl(@intFromEnum(linux.PR.SET_TIMERSLACK), 1, 0, 0, 0);
        var due_ns = os.monotonicNs();
        var count: u32 = 0;
        while (count < maker.tickets.len and due_ns < maker.until_ns and !maker.abandoned.load(.monotonic)) : (due_ns += maker.interval_ns) {
            const woken = sleepUntil(due_ns);
            // How late this thread was woken is nothing of Elgate's.
            if (woken.slept) due_ns = woken.now_ns;
            const result = elgate_append(maker.fd, &payload, maker.length_bytes, &maker.tickets[count]);
            if (result < 0) return result;
            maker.due_ns[count] = due_ns;
            count += 1;
            maker.tell(count);
        }
        return 0;
    }

    fn tell(maker: *Maker, count: u32) void {
        maker.made.store(count, .release);
        std.Thread.Futex.wake(&maker.made, 1);
    }

    /// How many there are, once there are more than so many; null: there will be no more.
    fn awaitMore(maker: *Maker, done: u32) ?u32 {
        while (true) {
            const ended = maker.ended.load(.acquire);
            const made = maker.made.load(.acquire);
            if (made > done) return made;
            if (ended) return null;
            std.Thread.Futex.timedWait(&maker.made, made, std.time.ns_per_ms) catch {};
        }
    }

    fn abandon(maker: *Maker, result: c_int) i64 {
        maker.abandoned.store(true, .monotonic);
        return result;
    }
};

/// As many appends as fit into the time, and what each took its producer, who waits where the ring is full.
export fn elgate_bench_append_times(fd: c_int, length_bytes: usize, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    var ticket: u64 = 0;
    var begin_ns = os.monotonicNs();
    for (0..samples) |i| {
        if (begin_ns >= until_ns) return @intCast(i);
        const result = elgate_append(fd, &payload, length_bytes, &ticket);
        if (result < 0) return result;
        const end_ns = os.monotonicNs();
        samples_ns[i] = end_ns - begin_ns;
        begin_ns = end_ns;
    }
    return @intCast(samples);
}

/// Appends at a steady pace by a thread that spins in between, so that nothing but the append is measured, and the wake of
/// a daemon that has gone to sleep. What the clock costs is in it.
export fn elgate_bench_append_paced(fd: c_int, length_bytes: usize, interval_ns: u64, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    var ticket: u64 = 0;
    var due_ns = os.monotonicNs();
    for (0..samples) |i| {
        var begin_ns = os.monotonicNs();
        while (begin_ns < due_ns) : (begin_ns = os.monotonicNs()) std.atomic.spinLoopHint();
        if (begin_ns >= until_ns) return @intCast(i);
        const result = elgate_append(fd, &payload, length_bytes, &ticket);
        if (result < 0) return result;
        samples_ns[i] = os.monotonicNs() - begin_ns;
        due_ns = begin_ns + interval_ns;
    }
    return @intCast(samples);
}

/// One record now and then, while everybody sleeps: until its producer knows that it was taken.
export fn elgate_bench_round_trip(fd: c_int, length_bytes: usize, interval_ns: u64, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    for (0..samples) |i| {
        const start = sleepUntil(os.monotonicNs() + interval_ns).now_ns;
        if (start >= until_ns) return @intCast(i);
        var ticket: u64 = 0;
        const result = elgate_append(fd, &payload, length_bytes, &ticket);
        if (result < 0) return result;
        const waited = elgate_wait(fd, ticket, level_applied, -1);
        if (waited < 0) return waited;
        samples_ns[i] = os.monotonicNs() - start;
    }
    return @intCast(samples);
}

/// The same between two threads that do nothing else: a futex there, a futex back.
export fn elgate_bench_futex_round_trip(fd: c_int, length_bytes: usize, interval_ns: u64, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    _ = fd;
    _ = length_bytes;
    var echo = Echo{};
    const thread = std.Thread.spawn(.{}, Echo.run, .{&echo}) catch return failed(@intFromEnum(linux.E.AGAIN));
    defer thread.join();
    defer echo.call(Echo.last);
    for (0..samples) |i| {
        const start = sleepUntil(os.monotonicNs() + interval_ns).now_ns;
        if (start >= until_ns) return @intCast(i);
        const number: u32 = @intCast(i + 1);
        echo.call(number);
        while (echo.answered.load(.acquire) != number) os.futexWait(&echo.answered.raw, number - 1, std.time.ns_per_s);
        samples_ns[i] = os.monotonicNs() - start;
    }
    return @intCast(samples);
}

const Echo = struct {
    called: std.atomic.Value(u32) = .init(0),
    answered: std.atomic.Value(u32) = .init(0),

    const last = std.math.maxInt(u32);

    fn call(echo: *Echo, number: u32) void {
        echo.called.store(number, .release);
        os.futexWake(&echo.called.raw, 1);
    }

    fn run(echo: *Echo) void {
        var seen: u32 = 0;
        while (true) {
            const called = echo.called.load(.acquire);
            if (called == last) return;
            if (called == seen) {
                os.futexWait(&echo.called.raw, seen, std.time.ns_per_s);
                continue;
            }
            seen = called;
            echo.answered.store(seen, .release);
            os.futexWake(&echo.answered.raw, 1);
        }
    }
};

/// write and fsync, as a hooked program does them.
export fn elgate_bench_write_fsync(fd: c_int, length_bytes: usize, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    for (0..samples) |i| {
        const start = os.monotonicNs();
        if (start >= until_ns) return @intCast(i);
        const result = elgate_write(fd, &payload, length_bytes);
        if (result < 0) return result;
        const synced = elgate_fsync(fd);
        if (synced < 0) return synced;
        samples_ns[i] = os.monotonicNs() - start;
    }
    return @intCast(samples);
}

/// Nobody waits: as many appends as fit into the time. Returns how many; all are applied when it returns.
export fn elgate_bench_flood(fd: c_int, length_bytes: usize, until_ns: u64) i64 {
    var count: i64 = 0;
    var ticket: u64 = 0;
    while (os.monotonicNs() < until_ns) {
        for (0..64) |_| {
            const result = elgate_append(fd, &payload, length_bytes, &ticket);
            if (result < 0) return result;
            count += 1;
        }
    }
    const waited = elgate_wait(fd, ticket, level_applied, -1);
    return if (waited < 0) waited else count;
}

/// write and fdatasync on a growing file: what a program without Elgate does.
export fn elgate_bench_native(fd: c_int, length_bytes: usize, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    for (0..samples) |i| {
        const start = os.monotonicNs();
        if (start >= until_ns) return @intCast(i);
        switch (os.check(linux.write(fd, &payload, length_bytes))) {
            .value => {},
            .errno => |errno| return failed(errno),
        }
        switch (os.check(linux.fdatasync(fd))) {
            .value => {},
            .errno => |errno| return failed(errno),
        }
        samples_ns[i] = os.monotonicNs() - start;
    }
    return @intCast(samples);
}

const RWF_DSYNC = 2;

/// Makes `file_bytes` of a file real: allocated, zero-written, synced. For the raw loop.
export fn elgate_bench_raw_prepare(fd: c_int, file_bytes: u64) i64 {
    const zeros: [block_size]u8 align(block_size) = @splat(0);
    var offset: u64 = 0;
    while (offset < file_bytes) : (offset += block_size) {
        switch (os.check(linux.pwrite(fd, &zeros, block_size, @intCast(offset)))) {
            .value => {},
            .errno => |errno| return failed(errno),
        }
    }
    return switch (os.check(linux.fsync(fd))) {
        .value => 0,
        .errno => |errno| failed(errno),
    };
}

/// The disk's own floor: one durable write of `length_bytes` (a multiple of 4096) after the other into a prepared
/// file. `fd` is O_DIRECT where the file system has that.
export fn elgate_bench_raw(fd: c_int, length_bytes: usize, file_bytes: u64, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    var offset: u64 = 0;
    for (0..samples) |i| {
        if (offset + length_bytes > file_bytes) offset = 0;
        const vector = [1]std.posix.iovec_const{.{ .base = &payload, .len = length_bytes }};
        const start = os.monotonicNs();
        if (start >= until_ns) return @intCast(i);
        switch (os.check(linux.pwritev2(fd, &vector, 1, @intCast(offset), RWF_DSYNC))) {
            .value => {},
            .errno => |errno| return failed(errno),
        }
        samples_ns[i] = os.monotonicNs() - start;
        offset += length_bytes;
    }
    return @intCast(samples);
}

/// As `elgate_bench_raw`, at a steady pace, by a thread that sleeps in between: one that comes late begins at its time.
export fn elgate_bench_raw_paced(fd: c_int, length_bytes: usize, file_bytes: u64, interval_ns: u64, samples_ns: [*]u64, samples: u64, until_ns: u64) i64 {
    _ = linux.prctl(@intFromEnum(linux.PR.SET_TIMERSLACK), 1, 0, 0, 0);
    var offset: u64 = 0;
    var due_ns = os.monotonicNs();
    for (0..samples) |i| {
        if (due_ns >= until_ns) return @intCast(i);
        const woken_ns = sleepUntil(due_ns);
        // How late this thread was woken is nothing of the disk's.
        if (woken_ns.slept) due_ns = woken_ns.now_ns;
        if (offset + length_bytes > file_bytes) offset = 0;
        const vector = [1]std.posix.iovec_const{.{ .base = &payload, .len = length_bytes }};
        switch (os.check(linux.pwritev2(fd, &vector, 1, @intCast(offset), RWF_DSYNC))) {
            .value => {},
            .errno => |errno| return failed(errno),
        }
        samples_ns[i] = os.monotonicNs() - due_ns;
        offset += length_bytes;
        due_ns += interval_ns;
    }
    return @intCast(samples);
}

fn sleepUntil(due_ns: u64) struct { now_ns: u64, slept: bool } {
    var now_ns = os.monotonicNs();
    var slept = false;
    while (now_ns < due_ns) : (now_ns = os.monotonicNs()) {
        slept = true;
        const until = linux.timespec{ .sec = @intCast(due_ns / std.time.ns_per_s), .nsec = @intCast(due_ns % std.time.ns_per_s) };
        _ = linux.clock_nanosleep(.MONOTONIC, .{ .ABSTIME = true }, &until, null);
    }
    return .{ .now_ns = now_ns, .slept = slept };
}

/// write() to the page cache, as many as fit into the time: the native peer of the flood. Returns how many.
export fn elgate_bench_page_cache_flood(fd: c_int, length_bytes: usize, until_ns: u64) i64 {
    var count: i64 = 0;
    while (os.monotonicNs() < until_ns) {
        for (0..64) |_| {
            switch (os.check(linux.write(fd, &payload, length_bytes))) {
                .value => count += 1,
                .errno => |errno| return failed(errno),
            }
        }
    }
    return count;
}

/// Makes a log of `log_bytes` in `directory` (which must not exist), each record with `length_bytes` of payload, and
/// then does with it what a start does: open, recover, every record to somebody who takes it. As often as there are
/// samples, each the time of one such start; their number is returned.
export fn elgate_bench_replay(directory: [*:0]const u8, length_bytes: u32, log_bytes: u64, samples_ns: [*]u64, samples: u64) i64 {
    return replay(std.mem.span(directory), length_bytes, log_bytes, samples_ns[0..samples]) catch |err| {
        std.debug.print("replay: {s}\n", .{@errorName(err)});
        return failed(@intFromEnum(linux.E.IO));
    };
}

fn replay(directory: []const u8, length_bytes: u32, log_bytes: u64, samples_ns: []u64) !i64 {
    const allocator = std.heap.c_allocator;
    const options = log_module.Options{ .segment_bytes = 64 << 20, .log_bytes_max = 1 << 40 };
    // To make it, nothing need be durable; to read it back, that makes no difference.
    var storage = log_module.LinuxStorage.init(.{ .no_sync = true });
    const memory = try allocator.alignedAlloc(u8, .fromByteUnits(block_size), 1 << 20);
    defer allocator.free(memory);
    var group = log_module.Group.init(memory);
    var written: u64 = 0;
    {
        const log = try log_module.Log.open(allocator, storage.storage(), directory, options);
        defer log.close();
        _ = try log.recover(.{ .context = log, .visit = Taker.nothing });
        const checksum = @import("format/checksum.zig").crc32c(0, payload[0..length_bytes]);
        while (written < log_bytes) {
            group.begin(log);
            while (group.append(.{ .kind = .write, .length_bytes = length_bytes, .payload_checksum = checksum })) |slot| @memcpy(slot.payload, payload[0..length_bytes]);
            try log.commit(&group);
            written += group.commitBytes();
            if (log.needsPreparation()) try log.prepareNextSegment();
        }
    }
    for (samples_ns) |*sample| {
        const start = os.monotonicNs();
        const log = try log_module.Log.open(allocator, storage.storage(), directory, options);
        defer log.close();
        var taker = Taker{};
        const recovery = try log.recover(.{ .context = &taker, .visit = Taker.visit });
        sample.* = os.monotonicNs() - start;
        if (recovery.missing_records > 0 or taker.records != 2 * recovery.record_count) return error.ReplayIncomplete;
    }
    return @intCast(samples_ns.len);
}

const Taker = struct {
    records: u64 = 0,
    bytes: u64 = 0,

    fn visit(context: *anyopaque, _: log_module.Pass, _: *const wal.RecordHeader, record: []const u8) error{VisitorStopped}!void {
        const taker: *Taker = @ptrCast(@alignCast(context));
        taker.records += 1;
        taker.bytes += record.len;
    }

    fn nothing(_: *anyopaque, _: log_module.Pass, _: *const wal.RecordHeader, _: []const u8) error{VisitorStopped}!void {}
};
