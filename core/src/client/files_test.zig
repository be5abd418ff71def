//! What a program sees of its routed files.

const std = @import("std");
const linux = std.os.linux;
const testing = std.testing;
const library = @import("../elgate_client.zig");
const control = @import("../format/control.zig");
const positions = @import("../format/positions.zig");
const ring = @import("../format/ring.zig");
const fake = @import("../testing/fake_daemon.zig");
const files = @import("files.zig");
const harness = @import("harness.zig");
const session = &@import("session.zig").process;
const Fixture = harness.Fixture;
const E = linux.E;

const everything = [_]fake.RouteSpec{.{ .name = "all", .pattern = "/**" }};

fn errno(code: E) i32 {
    return -@as(i32, @intFromEnum(code));
}

test "write, pwrite, writev and append go where the program means, and the kernel's offset follows" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("positional", false);
    try testing.expectEqual(1, library.elgate_is_routed(fd));
    try testing.expectEqual(5, harness.write(fd, "hello"));
    try testing.expectEqual(5, harness.offsetOf(fd));
    try testing.expectEqual(6, harness.write(fd, " world"));
    try testing.expectEqual(11, harness.offsetOf(fd));
    try testing.expectEqual(1, library.elgate_pwrite(fd, "J", 1, 0));
    const vectors = [_]files.Vector{
        .{ .base = "!!", .length = 2 },
        .{ .base = null, .length = 0 },
        .{ .base = "?", .length = 1 },
    };
    try testing.expectEqual(3, library.elgate_writev(fd, &vectors, 3));
    try testing.expectEqual(3, library.elgate_pwritev(fd, &vectors, 3, 20));
    try testing.expectEqual(14, harness.offsetOf(fd));
    try testing.expectEqual(0, library.elgate_drain(fd));
    try fixture.expectContents("positional", "Jello world!!?\x00\x00\x00\x00\x00\x00!!?");
    try testing.expectEqual(0, harness.close(fd));

    const log = try fixture.create("appended", true);
    try testing.expectEqual(3, harness.write(log, "one"));
    try testing.expectEqual(3, library.elgate_pwrite(log, "two", 3, 0)); // as Linux: O_APPEND wins, and the offset stays
    try testing.expectEqual(0, library.elgate_drain(log));
    try testing.expectEqual(3, harness.offsetOf(log));
    try fixture.expectContents("appended", "onetwo");
    try testing.expectEqual(0, harness.close(log));
    const status = harness.status();
    try testing.expectEqual(1, status.connected);
    try testing.expectEqual(0, status.routed_files);
    try testing.expectEqual(0, fixture.daemon.count("rejected"));
    try testing.expectEqual(2, fixture.daemon.count("releases"));
}

test "what is not on a route costs nothing and is left alone" {
    const fixture = try Fixture.init(&.{.{ .name = "logs", .pattern = "/logs/*.log" }});
    defer fixture.deinit();
    const directory = fixture.path("logs");
    _ = fake.check(linux.mkdir(&directory, 0o700));
    try testing.expectEqual(1, library.elgate_path_is_routed(&fixture.path("logs/new.log")));
    try testing.expectEqual(0, library.elgate_path_is_routed(&fixture.path("logs/new.txt")));
    const plain = try fixture.open("plain", .{ .ACCMODE = .RDWR, .CREAT = true });
    try testing.expectEqual(0, plain.routed);
    for ([_]i32{ plain.fd, -1, 1 << 30 }) |fd| {
        try testing.expectEqual(harness.native, harness.write(fd, "x"));
        try testing.expectEqual(harness.native, library.elgate_writev(fd, null, -1));
        try testing.expectEqual(harness.native, library.elgate_fsync(fd));
        try testing.expectEqual(harness.native, library.elgate_ftruncate(fd, 0));
        try testing.expectEqual(harness.native, library.elgate_fallocate(fd, 0, 0, 1));
        try testing.expectEqual(harness.native, library.elgate_duplicated(fd, 5));
        try testing.expectEqual(0, library.elgate_is_routed(fd));
        try testing.expectEqual(0, library.elgate_drain(fd));
        try testing.expectEqual(0, library.elgate_close(fd));
        try testing.expectEqual(0, library.elgate_flags_changed(fd));
        try testing.expectEqual(0, library.elgate_go_native(fd, 1));
    }
    _ = linux.close(plain.fd);
    // A symlink into the route counts as what it points to.
    const link = fixture.path("link");
    _ = fake.check(linux.symlink("logs/a.log", &link));
    const routed = try fixture.open("link", .{ .ACCMODE = .WRONLY, .CREAT = true });
    try testing.expectEqual(1, routed.routed);
    try testing.expectEqual(0, harness.close(routed.fd));
    try testing.expectEqual(0, fixture.daemon.count("registrations"));
}

test "a file that is only opened is not registered; its fsync is the kernel's" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("idle", false);
    try testing.expectEqual(0, library.elgate_fsync(fd));
    try testing.expectEqual(0, harness.write(fd, ""));
    try testing.expectEqual(0, fixture.daemon.count("registrations"));
    try testing.expectEqual(1, harness.write(fd, "x"));
    try testing.expectEqual(0, library.elgate_fsync(fd));
    try testing.expectEqual(1, fixture.daemon.count("barriers"));
    // Another descriptor, nothing written through it: but the file is marked.
    const other = try fixture.open("idle", .{ .ACCMODE = .WRONLY });
    try testing.expectEqual(0, library.elgate_fsync(other.fd));
    try testing.expectEqual(2, fixture.daemon.count("barriers"));
    // Nobody else writes it: the positions alone tell.
    @atomicStore(u32, &fixture.daemon.handleState(0).file_handles, 1, .seq_cst);
    try testing.expectEqual(1, harness.write(fd, "y"));
    try testing.expectEqual(0, library.elgate_fsync(fd));
    try testing.expectEqual(2, fixture.daemon.count("barriers"));
    try testing.expectEqual(0, harness.close(other.fd));
    try testing.expectEqual(0, harness.close(fd));
}

test "ftruncate and fallocate happen in order, and report their own errors" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    try testing.expectEqual(6, harness.write(fd, "abcdef"));
    try testing.expectEqual(0, library.elgate_ftruncate(fd, 3));
    try testing.expectEqual(1, harness.write(fd, "g"));
    try testing.expectEqual(0, library.elgate_fallocate(fd, 0, 0, 6));
    try testing.expectEqual(0, library.elgate_drain(fd));
    try fixture.expectContents("file", "abcg\x00\x00");
    try testing.expectEqual(errno(.INVAL), library.elgate_ftruncate(fd, -1));
    try testing.expectEqual(errno(.INVAL), library.elgate_fallocate(fd, 0, -1, 1));
    try testing.expectEqual(errno(.INVAL), library.elgate_fallocate(fd, 0, 0, 0));
    try testing.expectEqual(errno(.FBIG), library.elgate_fallocate(fd, 0, std.math.maxInt(i64), 1));
    try testing.expectEqual(errno(.FBIG), @as(i32, @intCast(library.elgate_pwrite(fd, "x", 1, -1) - errno(.INVAL) + errno(.FBIG))));
    // PUNCH_HOLE: no operation of the log, so the file is native from here on, and the caller asks the kernel.
    try testing.expectEqual(harness.native, library.elgate_fallocate(fd, 3, 0, 1));
    try testing.expectEqual(0, library.elgate_is_routed(fd));
    try testing.expectEqual(0, harness.close(fd));
}

test "arguments that the kernel would refuse are refused" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", false);
    try testing.expectEqual(errno(.FAULT), library.elgate_write(fd, null, 1));
    try testing.expectEqual(errno(.INVAL), library.elgate_pwrite(fd, "x", 1, -5));
    try testing.expectEqual(errno(.INVAL), library.elgate_writev(fd, null, -1));
    try testing.expectEqual(errno(.INVAL), library.elgate_writev(fd, null, 1025));
    try testing.expectEqual(errno(.FAULT), library.elgate_writev(fd, null, 1));
    try testing.expectEqual(0, library.elgate_writev(fd, null, 0));
    const overflowing = [_]files.Vector{ .{ .base = "x", .length = std.math.maxInt(usize) }, .{ .base = "x", .length = 2 } };
    try testing.expectEqual(errno(.INVAL), library.elgate_writev(fd, &overflowing, 2));
    // Beyond what any file system may take, the kernel is asked.
    const far = try fixture.create("far", false);
    try testing.expectEqual(1, harness.write(far, "x"));
    try testing.expectEqual(harness.native, library.elgate_pwrite(far, "x", 1, 1 << 40));
    try testing.expectEqual(0, harness.close(far));
    var ticket: u64 = 0;
    try testing.expectEqual(errno(.MSGSIZE), library.elgate_append(fd, "x", ring.payload_bytes_max + 1, &ticket));
    try testing.expectEqual(errno(.FAULT), library.elgate_append(fd, "x", 1, null));
    try testing.expectEqual(errno(.INVAL), library.elgate_wait(fd, 0, 2, 10));
    try testing.expectEqual(0, harness.offsetOf(fd));
    try testing.expectEqual(0, harness.close(fd));
}

test "the longest write fits; a longer one drains, fences, and goes by natively from then on" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    const bytes = try testing.allocator.alloc(u8, ring.payload_bytes_max + 1);
    defer testing.allocator.free(bytes);
    for (bytes, 0..) |*byte, index| byte.* = @truncate(index *% 7);
    try testing.expectEqual(ring.payload_bytes_max, library.elgate_write(fd, bytes.ptr, ring.payload_bytes_max));
    const before = harness.status();
    try testing.expectEqual(harness.native, library.elgate_write(fd, bytes.ptr, bytes.len));
    try testing.expectEqual(1, fixture.daemon.count("fences"));
    try testing.expectEqual(3, fixture.daemon.count("fence_reason"));
    try testing.expectEqual(ring.payload_bytes_max, harness.offsetOf(fd));
    const found = try testing.allocator.alloc(u8, ring.payload_bytes_max + 10);
    defer testing.allocator.free(found);
    try testing.expectEqualSlices(u8, bytes[0..ring.payload_bytes_max], try fixture.contents("file", found));
    try testing.expectEqual(harness.native, harness.write(fd, "x"));
    try testing.expectEqual(harness.native, library.elgate_fsync(fd));
    try testing.expectEqual(0, library.elgate_is_routed(fd));
    const after = harness.status();
    try testing.expectEqual(before.native_fallbacks + 1, after.native_fallbacks);
    try testing.expectEqual(103, after.last_fallback_reason);
    try testing.expectEqual(before.native_bytes + bytes.len + 1, after.native_bytes);
    try testing.expectEqual(0, harness.close(fd));
}

test "a mapped file stays native in all its descriptors, later ones too" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const first = try fixture.create("file", false);
    const second = (try fixture.open("file", .{ .ACCMODE = .WRONLY })).fd;
    const reader = (try fixture.open("file", .{})).fd;
    try testing.expectEqual(1, harness.write(first, "a"));
    try testing.expectEqual(1, library.elgate_pwrite(second, "b", 1, 1));
    try testing.expectEqual(0, library.elgate_go_native(reader, 1));
    try fixture.expectContents("file", "ab");
    for ([_]i32{ first, second }) |fd| try testing.expectEqual(harness.native, harness.write(fd, "x"));
    try testing.expectEqual(1, fixture.daemon.count("fences"));
    for ([_]i32{ first, second, reader }) |fd| try testing.expectEqual(0, harness.close(fd));
    const later = try fixture.open("file", .{ .ACCMODE = .WRONLY });
    try testing.expectEqual(0, later.routed);
    try testing.expectEqual(harness.native, harness.write(later.fd, "x"));
    try testing.expectEqual(0, harness.close(later.fd));
}

test "a file that goes native before its first write is known to the daemon until its last descriptor is closed" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const first = try fixture.create("file", true);
    const second = (try fixture.open("file", .{ .ACCMODE = .WRONLY })).fd;
    try testing.expectEqual(0, library.elgate_go_native(first, 2));
    try testing.expectEqual(1, fixture.daemon.count("fences"));
    try testing.expectEqual(2, fixture.daemon.count("registrations"));
    try testing.expectEqual(harness.native, harness.write(second, "x"));
    // One more beside them: it must hold the file native after those two are closed.
    const third = try fixture.open("file", .{ .ACCMODE = .WRONLY });
    try testing.expectEqual(0, third.routed);
    try testing.expectEqual(3, fixture.daemon.count("registrations"));
    for ([_]i32{ second, third.fd, first }, 1..) |fd, released| {
        try testing.expectEqual(0, harness.close(fd));
        try testing.expectEqual(released, fixture.daemon.count("releases"));
    }
    // What was passed on lives in another program: its handle stays.
    const passed = try fixture.create("passed", true);
    try testing.expectEqual(0, library.elgate_go_native(passed, 5));
    try testing.expectEqual(0, harness.close(passed));
    try testing.expectEqual(4, fixture.daemon.count("registrations"));
    try testing.expectEqual(3, fixture.daemon.count("releases"));
}

test "going native waits for operations that are under way, and they for it" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    const Writer = struct {
        fd: i32,
        written: u64 = 0,
        fn run(writer: *@This()) void {
            while (true) {
                const result = harness.write(writer.fd, "0123456789");
                if (result != 10) return;
                _ = @atomicRmw(u64, &writer.written, .Add, 10, .seq_cst);
            }
        }
    };
    var writers = [_]Writer{.{ .fd = fd }} ** 3;
    var threads: [3]std.Thread = undefined;
    for (&threads, &writers) |*thread, *writer| thread.* = try std.Thread.spawn(.{}, Writer.run, .{writer});
    try harness.eventually(@as(*[3]Writer, &writers), struct {
        fn started(all: *[3]Writer) bool {
            for (all) |*writer| if (@atomicLoad(u64, &writer.written, .seq_cst) < 1000) return false;
            return true;
        }
    }.started);
    try testing.expectEqual(0, library.elgate_go_native(fd, 5));
    for (threads) |thread| thread.join();
    var total: u64 = 0;
    for (writers) |writer| total += writer.written;
    var found: linux.Stat = undefined;
    _ = fake.check(linux.fstat(fd, &found));
    try testing.expectEqual(total, @as(u64, @bitCast(found.size)));
    try testing.expectEqual(total, harness.offsetOf(fd));
    try testing.expectEqual(0, harness.close(fd));
}

test "a look at a file costs a question only where somebody else may have something pending" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const unmarked = try fixture.open("unmarked", .{ .ACCMODE = .RDONLY, .CREAT = true });
    try testing.expectEqual(0, library.elgate_drain(unmarked.fd));
    try testing.expectEqual(0, library.elgate_drain(unmarked.fd));
    try testing.expectEqual(0, fixture.daemon.count("drains"));
    // A process that has known it unmarked sees that it has got the mark, also from a daemon that has come since.
    for (0..2) |round| {
        const marking = try fixture.create("unmarked", true);
        try testing.expectEqual(1, harness.write(marking, "a"));
        try testing.expectEqual(0, harness.close(marking));
        try testing.expectEqual(0, library.elgate_drain(unmarked.fd));
        try testing.expectEqual(round + 1, fixture.daemon.count("drains"));
        _ = fake.check(linux.syscall2(.fremovexattr, @intCast(unmarked.fd), @intFromPtr("user.elgate")));
        try testing.expectEqual(0, library.elgate_drain(unmarked.fd));
        try testing.expectEqual(0, library.elgate_drain(unmarked.fd));
        try testing.expectEqual(round + 1, fixture.daemon.count("drains"));
        fixture.daemon.die();
        fixture.daemon.forgetFiles();
        fixture.daemon.serve();
    }
    fixture.daemon.drains = 0;
    try testing.expectEqual(0, harness.close(unmarked.fd));

    const writer = try fixture.create("file", true);
    const reader = try fixture.open("file", .{});
    try testing.expectEqual(1, harness.write(writer, "a"));
    // The fake daemon says that others have it open too: a barrier.
    try testing.expectEqual(0, library.elgate_drain(writer));
    try testing.expectEqual(1, fixture.daemon.count("barriers"));
    try testing.expectEqual(0, library.elgate_drain(reader.fd));
    try testing.expectEqual(2, fixture.daemon.count("barriers"));
    @atomicStore(u32, &fixture.daemon.handleState(fixture.daemon.lastHandle()).file_handles, 1, .seq_cst);
    try testing.expectEqual(0, library.elgate_drain(writer));
    try testing.expectEqual(0, library.elgate_drain(reader.fd));
    try testing.expectEqual(2, fixture.daemon.count("barriers"));
    try testing.expectEqual(0, fixture.daemon.count("drains"));

    // Alone with it as far as the daemon knew that is gone now: the next one is asked.
    fixture.daemon.die();
    fixture.daemon.serve();
    try testing.expectEqual(0, library.elgate_drain(writer));
    try testing.expectEqual(3, fixture.daemon.count("barriers"));

    // No writer in this process, and the mark is still there.
    try testing.expectEqual(0, harness.close(writer));
    try testing.expectEqual(0, library.elgate_drain(reader.fd));
    try testing.expectEqual(1, fixture.daemon.count("drains"));
    // One that has written nothing yet is registered for it.
    const second = try fixture.open("file", .{ .ACCMODE = .RDWR });
    try testing.expectEqual(0, library.elgate_drain(second.fd));
    try testing.expectEqual(4, fixture.daemon.count("barriers"));
    try testing.expectEqual(0, harness.close(second.fd));
    try testing.expectEqual(0, harness.close(reader.fd));
}

test "what another process fenced is left natively here too" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    try testing.expectEqual(1, harness.write(fd, "a"));
    setNative(fixture, .native);
    try testing.expectEqual(harness.native, harness.write(fd, "b"));
    try fixture.expectContents("file", "a");
    // Registered for as long as it is open: the daemon must know that somebody writes it natively.
    try testing.expectEqual(0, fixture.daemon.count("releases"));
    try testing.expectEqual(0, harness.close(fd));
    try testing.expectEqual(1, fixture.daemon.count("releases"));
}

fn setNative(fixture: Fixture, native: positions.Native) void {
    @atomicStore(positions.Native, &fixture.daemon.handleState(fixture.daemon.lastHandle()).native, native, .seq_cst);
}

test "while another process's fence is being logged nothing is sent behind it; what it comes to decides" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    const Writer = struct {
        fd: i32,
        written: u64 = 0,
        fn run(writer: *@This()) void {
            while (harness.write(writer.fd, "0123456789") == 10) _ = @atomicRmw(u64, &writer.written, .Add, 10, .seq_cst);
        }
        fn total(all: []@This()) u64 {
            var sum: u64 = 0;
            for (all) |*writer| sum += @atomicLoad(u64, &writer.written, .seq_cst);
            return sum;
        }
    };
    try testing.expectEqual(1, harness.write(fd, "a"));
    var writers = [_]Writer{.{ .fd = fd }} ** 3;
    var threads: [3]std.Thread = undefined;
    for (&threads, &writers) |*thread, *writer| thread.* = try std.Thread.spawn(.{}, Writer.run, .{writer});
    const Goal = struct { writers: []Writer, bytes: u64 };
    for (0..100) |_| {
        const goal = Goal{ .writers = &writers, .bytes = Writer.total(&writers) + 1000 };
        try harness.eventually(&goal, struct {
            fn reached(wanted: *const Goal) bool {
                return Writer.total(wanted.writers) >= wanted.bytes;
            }
        }.reached);
        setNative(fixture, .undecided);
        // As the daemon does: whoever claims from here on sees it.
        fixture.daemon.awaitScan();
        const behind = fixture.daemon.count("records");
        for (0..50) |_| std.Thread.yield() catch {};
        fixture.daemon.awaitScan();
        try testing.expectEqual(behind, fixture.daemon.count("records"));
        setNative(fixture, .routed);
    }
    setNative(fixture, .undecided);
    fixture.daemon.awaitScan();
    setNative(fixture, .native);
    for (threads) |thread| thread.join();
    var found: linux.Stat = undefined;
    _ = fake.check(linux.fstat(fd, &found));
    try testing.expectEqual(1 + Writer.total(&writers), @as(u64, @bitCast(found.size)));
    try testing.expectEqual(harness.native, harness.write(fd, "x"));
    try testing.expectEqual(0, harness.close(fd));
}

test "a file that the daemon refuses is native, counted, and asked for once" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    @atomicStore(u32, &fixture.daemon.refuse, @intFromEnum(control.Refusal.cannot_reopen), .seq_cst);
    const fd = try fixture.create("file", false);
    const before = harness.status().native_fallbacks;
    try testing.expectEqual(harness.native, harness.write(fd, "x"));
    try testing.expectEqual(harness.native, harness.write(fd, "x"));
    try testing.expectEqual(harness.native, library.elgate_fsync(fd));
    try testing.expectEqual(0, library.elgate_drain(fd));
    try testing.expectEqual(0, harness.offsetOf(fd));
    try testing.expectEqual(before + 1, harness.status().native_fallbacks);
    try testing.expectEqual(@intFromEnum(control.Refusal.cannot_reopen), harness.status().last_fallback_reason);
    try testing.expectEqual(0, harness.close(fd));
}

test "a full ring: EAGAIN, ENOSPC, or waiting until there is room" {
    const fixture = try Fixture.init(&.{
        .{ .name = "strict", .pattern = "/strict-*", .flags = .{ .on_full_error = true } },
        .{ .name = "patient", .pattern = "/patient-*" },
    });
    defer fixture.deinit();
    const patient = try fixture.create("patient-file", true);
    const nonblocking = (try fixture.open("patient-nonblocking", .{ .ACCMODE = .WRONLY, .CREAT = true, .NONBLOCK = true })).fd;
    const strict = try fixture.create("strict-file", false);
    for ([_]i32{ patient, nonblocking, strict }) |fd| {
        try testing.expectEqual(1, harness.write(fd, "."));
        try testing.expectEqual(0, library.elgate_fsync(fd));
    }
    fixture.daemon.pause(true);
    // A route that has records for a quarter of the ring, seen or not, waits.
    for (0..256) |_| try testing.expectEqual(1, harness.write(patient, "x"));
    try testing.expectEqual(errno(.AGAIN), harness.write(nonblocking, "y"));
    try testing.expectEqual(1, harness.offsetOf(nonblocking));
    try testing.expectEqual(errno(.NOSPC), harness.write(strict, "z"));
    try testing.expectEqual(1, harness.offsetOf(strict));
    const waits = harness.status().full_ring_waits;
    const Waiter = struct {
        fd: i32,
        done: i64 = 0,
        fn run(waiter: *@This()) void {
            @atomicStore(i64, &waiter.done, harness.write(waiter.fd, "last"), .seq_cst);
        }
    };
    var waiter = Waiter{ .fd = patient };
    const thread = try std.Thread.spawn(.{}, Waiter.run, .{&waiter});
    try harness.eventually(waits, struct {
        fn waiting(before: u64) bool {
            return harness.status().full_ring_waits > before;
        }
    }.waiting);
    try testing.expectEqual(0, @atomicLoad(i64, &waiter.done, .seq_cst));
    fixture.daemon.pause(false);
    thread.join();
    try testing.expectEqual(4, waiter.done);
    try testing.expectEqual(1, harness.write(strict, "z"));
    for ([_]i32{ patient, nonblocking, strict }) |fd| try testing.expectEqual(0, harness.close(fd));
    var buffer: [400]u8 = undefined;
    const found = try fixture.contents("patient-file", &buffer);
    try testing.expectEqual(261, found.len);
    try testing.expectEqualStrings("last", found[257..]);
    try fixture.expectContents("strict-file", ".z");
}

test "a route that takes nothing new: EAGAIN, ENOSPC, or waiting until it does; what makes room goes on" {
    const fixture = try Fixture.init(&.{
        .{ .name = "strict", .pattern = "/strict-*", .flags = .{ .on_full_error = true } },
        .{ .name = "patient", .pattern = "/patient-*" },
        .{ .name = "other", .pattern = "/other-*" },
    });
    defer fixture.deinit();
    const patient = try fixture.create("patient-file", true);
    const nonblocking = (try fixture.open("patient-nonblocking", .{ .ACCMODE = .WRONLY, .CREAT = true, .NONBLOCK = true })).fd;
    const strict = try fixture.create("strict-file", false);
    const other = try fixture.create("other-file", false);
    for ([_]i32{ patient, nonblocking, strict, other }) |fd| {
        try testing.expectEqual(1, harness.write(fd, "."));
        try testing.expectEqual(0, library.elgate_fsync(fd));
    }
    // The log's errno is not what the policy says.
    const strict_line = fixture.daemon.routePositions(0);
    const patient_line = fixture.daemon.routePositions(1);
    for ([_]*positions.RoutePositions{ strict_line, patient_line }) |line| {
        line.failure_errno = @intFromEnum(E.DQUOT);
        @atomicStore(u32, &line.closed, 1, .seq_cst);
    }
    try testing.expectEqual(errno(.AGAIN), harness.write(nonblocking, "y"));
    try testing.expectEqual(1, harness.offsetOf(nonblocking));
    try testing.expectEqual(errno(.NOSPC), harness.write(strict, "z"));
    try testing.expectEqual(1, harness.write(other, "z"));
    const waits = harness.status().full_ring_waits;
    const Waiter = struct {
        fd: i32,
        done: i64 = 0,
        fn run(waiter: *@This()) void {
            @atomicStore(i64, &waiter.done, harness.write(waiter.fd, "last"), .seq_cst);
        }
    };
    var waiter = Waiter{ .fd = patient };
    const thread = try std.Thread.spawn(.{}, Waiter.run, .{&waiter});
    try harness.eventually(waits, struct {
        fn waiting(before: u64) bool {
            return harness.status().full_ring_waits > before;
        }
    }.waiting);
    try testing.expectEqual(0, @atomicLoad(i64, &waiter.done, .seq_cst));
    for ([_]*positions.RoutePositions{ strict_line, patient_line }) |line| {
        line.failure_errno = 0;
        @atomicStore(u32, &line.closed, 0, .seq_cst);
    }
    thread.join(); // woken by nobody: every wait is bounded
    try testing.expectEqual(4, waiter.done);
    @atomicStore(u32, &strict_line.closed, 1, .seq_cst);
    try testing.expectEqual(0, library.elgate_ftruncate(strict, 0));
    @atomicStore(u32, &strict_line.closed, 0, .seq_cst);
    for ([_]i32{ patient, nonblocking, strict, other }) |fd| try testing.expectEqual(0, harness.close(fd));
    try fixture.expectContents("patient-file", ".last");
    try fixture.expectContents("strict-file", "");
    try fixture.expectContents("other-file", ".z");
}

test "an error of the target comes back once to every handle, on write, fsync or close" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    var fds: [3]i32 = undefined;
    for (&fds) |*fd| {
        fd.* = (try fixture.open("file", .{ .ACCMODE = .WRONLY, .CREAT = true, .APPEND = true })).fd;
        try testing.expectEqual(1, harness.write(fd.*, "x"));
    }
    for (0..3) |handle| fixture.daemon.reportError(@intCast(handle), @intFromEnum(E.NOSPC));
    // Who reads is shown it, and it stays to be reported.
    try testing.expectEqual(errno(.NOSPC), library.elgate_drain(fds[0]));
    try testing.expectEqual(errno(.NOSPC), library.elgate_drain(fds[0]));
    try testing.expectEqual(errno(.NOSPC), harness.write(fds[0], "y"));
    try testing.expectEqual(1, harness.write(fds[0], "y"));
    try testing.expectEqual(errno(.NOSPC), library.elgate_fsync(fds[1]));
    try testing.expectEqual(0, library.elgate_fsync(fds[1]));
    try testing.expectEqual(0, harness.close(fds[0]));
    try testing.expectEqual(0, harness.close(fds[1]));
    try testing.expectEqual(errno(.NOSPC), harness.close(fds[2]));
    // A new handle starts clean.
    const later = (try fixture.open("file", .{ .ACCMODE = .WRONLY, .APPEND = true })).fd;
    try testing.expectEqual(1, harness.write(later, "z"));
    // A fault that lasts is told at once, each time.
    const state = fixture.daemon.handleState(fixture.daemon.lastHandle());
    @atomicStore(i32, &state.failed_errno, @intFromEnum(E.ROFS), .seq_cst);
    try testing.expectEqual(errno(.ROFS), harness.write(later, "z"));
    try testing.expectEqual(errno(.ROFS), harness.write(later, "z"));
    @atomicStore(i32, &state.failed_errno, 0, .seq_cst);
    const line = fixture.daemon.routePositions(0);
    @atomicStore(i32, &line.failure_errno, @intFromEnum(E.IO), .seq_cst);
    try testing.expectEqual(errno(.IO), harness.write(later, "z"));
    @atomicStore(i32, &line.failure_errno, 0, .seq_cst);
    try testing.expectEqual(0, harness.close(later));
    try fixture.expectContents("file", "xxxyz");
}

test "O_DIRECT, at the open or by F_SETFL, makes the file native at once" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    try testing.expectEqual(1, harness.write(fd, "a"));
    const direct = try fixture.open("file", .{ .ACCMODE = .WRONLY, .DIRECT = true });
    try testing.expectEqual(0, direct.routed);
    try testing.expectEqual(1, fixture.daemon.count("fences"));
    try testing.expectEqual(102, harness.status().last_fallback_reason);
    try testing.expectEqual(harness.native, harness.write(fd, "b"));
    try testing.expectEqual(0, harness.close(direct.fd));
    try testing.expectEqual(0, harness.close(fd));

    const later = try fixture.create("later", false);
    try testing.expectEqual(1, harness.write(later, "a"));
    _ = fake.check(linux.fcntl(later, linux.F.SETFL, @as(u32, @bitCast(linux.O{ .DIRECT = true }))));
    try testing.expectEqual(0, library.elgate_flags_changed(later));
    try testing.expectEqual(harness.native, harness.write(later, "b"));
    try testing.expectEqual(2, fixture.daemon.count("fences"));
    try testing.expectEqual(0, harness.close(later));
}

test "O_TRUNC on a file that the log knows is logged; on a new one it is nothing" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const flags = linux.O{ .ACCMODE = .WRONLY, .CREAT = true, .TRUNC = true };
    const first = try fixture.open("file", flags);
    try testing.expectEqual(1, first.routed);
    try testing.expectEqual(0, fixture.daemon.count("truncates"));
    try testing.expectEqual(8, harness.write(first.fd, "old text"));
    const second = try fixture.open("file", flags);
    try testing.expectEqual(1, second.routed);
    try testing.expectEqual(1, fixture.daemon.count("truncates"));
    try testing.expectEqual(3, harness.write(second.fd, "new"));
    try testing.expectEqual(0, harness.close(first.fd));
    try testing.expectEqual(0, harness.close(second.fd));
    try fixture.expectContents("file", "new");
}

test "this process reads its own writes, through any descriptor" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const writer = try fixture.create("file", true);
    const reader = try fixture.open("file", .{});
    try testing.expectEqual(1, reader.routed);
    try testing.expectEqual(harness.native, harness.write(reader.fd, "no"));
    try testing.expectEqual(harness.native, library.elgate_fsync(reader.fd));
    for (0..20) |round| {
        try testing.expectEqual(1, harness.write(writer, &.{@intCast('a' + round)}));
        try testing.expectEqual(0, library.elgate_drain(reader.fd));
        var byte: [2]u8 = undefined;
        try testing.expectEqual(1, fake.check(linux.read(reader.fd, &byte, 2)));
        try testing.expectEqual('a' + round, byte[0]);
    }
    try testing.expectEqual(1, harness.status().routed_files);
    // The writer's registration is void after a restart; the reader's drain renews it.
    fixture.daemon.pause(true);
    try testing.expectEqual(1, harness.write(writer, "!"));
    fixture.daemon.die();
    fixture.daemon.pause(false);
    fixture.daemon.serve();
    try testing.expectEqual(0, library.elgate_drain(reader.fd));
    var byte: [2]u8 = undefined;
    try testing.expectEqual(1, fake.check(linux.read(reader.fd, &byte, 2)));
    try testing.expectEqual('!', byte[0]);
    try testing.expectEqual(0, harness.close(reader.fd));
    try testing.expectEqual(0, harness.close(writer));
}

test "duplicates share one registration, and the last one gives it back" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", false);
    try testing.expectEqual(1, harness.write(fd, "a"));
    const copy: i32 = @intCast(fake.check(linux.dup(fd)));
    try testing.expectEqual(0, library.elgate_duplicated(fd, copy));
    try testing.expectEqual(1, harness.write(copy, "b"));
    try testing.expectEqual(2, harness.offsetOf(fd));
    try testing.expectEqual(0, harness.close(fd));
    try testing.expectEqual(0, fixture.daemon.count("releases"));
    try testing.expectEqual(1, harness.write(copy, "c"));
    try testing.expectEqual(0, harness.close(copy));
    try testing.expectEqual(1, fixture.daemon.count("releases"));
    try testing.expectEqual(1, fixture.daemon.count("registrations"));
    try fixture.expectContents("file", "abc");
    // dup2 over a routed descriptor, by a hook that forgot to close it first; then a native one over it.
    const first = try fixture.create("first", false);
    const second = try fixture.create("second", false);
    try testing.expectEqual(1, harness.write(second, "2"));
    _ = fake.check(linux.dup3(first, second, 0));
    try testing.expectEqual(0, library.elgate_duplicated(first, second));
    try testing.expectEqual(1, harness.write(second, "1"));
    try testing.expectEqual(0, library.elgate_drain(first));
    try fixture.expectContents("first", "1");
    try fixture.expectContents("second", "2");
    _ = fake.check(linux.dup3(0, second, 0));
    try testing.expectEqual(harness.native, library.elgate_duplicated(0, second));
    try testing.expectEqual(harness.native, harness.write(second, "x"));
    _ = linux.close(second);
    try testing.expectEqual(0, harness.close(first));
}

test "a number that was closed behind our back is another file's from then on" {
    const fixture = try Fixture.init(&.{.{ .name = "routed", .pattern = "/routed-*" }});
    defer fixture.deinit();
    const fd = try fixture.create("routed-a", false);
    try testing.expectEqual(1, harness.write(fd, "a"));
    try testing.expectEqual(0, library.elgate_drain(fd));
    // dup3 puts the stranger at the number in one step; the daemon of this test opens files meanwhile.
    const text = fixture.path("plain");
    const flags = linux.O{ .ACCMODE = .WRONLY, .CREAT = true };
    const stranger: i32 = @intCast(fake.check(linux.open(&text, flags, 0o600)));
    defer _ = linux.close(stranger);
    // Opened natively, through the hook: forgotten.
    _ = fake.check(linux.dup3(stranger, fd, 0));
    try testing.expectEqual(0, library.elgate_opened(fd, &text, @bitCast(flags)));
    try testing.expectEqual(harness.native, harness.write(fd, "x"));
    _ = linux.close(fd);
    // Not through the hook, and before it was registered: noticed at the registration.
    const unregistered = try fixture.create("routed-b", false);
    _ = fake.check(linux.dup3(stranger, unregistered, 0));
    try testing.expectEqual(harness.native, harness.write(unregistered, "x"));
    try testing.expectEqual(0, library.elgate_is_routed(unregistered));
    _ = linux.close(unregistered);
    try testing.expectEqual(0, harness.status().routed_files);
}

test "O_SYNC and the route's promises: durable or visible when the write returns" {
    const fixture = try Fixture.init(&.{
        .{ .name = "always", .pattern = "/always-*", .flags = .{ .flush_always = true } },
        .{ .name = "immediate", .pattern = "/immediate-*", .flags = .{ .visibility_immediate = true } },
        .{ .name = "plain", .pattern = "/**" },
    });
    defer fixture.deinit();
    for ([_][]const u8{ "always-a", "immediate-a" }) |name| {
        const fd = try fixture.create(name, true);
        try testing.expectEqual(3, harness.write(fd, "now"));
        try fixture.expectContents(name, "now");
        try testing.expectEqual(0, harness.close(fd));
    }
    const opened = try fixture.open("synchronous", .{ .ACCMODE = .WRONLY, .CREAT = true, .DSYNC = true });
    try testing.expectEqual(3, harness.write(opened.fd, "now"));
    try fixture.expectContents("synchronous", "now");
    try testing.expectEqual(1, fixture.daemon.count("barriers"));
    try testing.expectEqual(0, harness.close(opened.fd));
}

test "tickets" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", false);
    fixture.daemon.pause(true);
    // The registration needs the daemon, the append does not.
    var tickets: [3]u64 = undefined;
    for (&tickets) |*ticket| try testing.expectEqual(0, library.elgate_append(fd, "abc", 3, ticket));
    try testing.expect(tickets[0] < tickets[1] and tickets[1] < tickets[2]);
    try testing.expectEqual(0, library.elgate_wait(fd, tickets[2], 0, 0));
    for (1..4) |level| try testing.expectEqual(errno(.TIMEDOUT), library.elgate_wait(fd, tickets[0], @intCast(level), 5));
    try testing.expectEqual(errno(.INVAL), library.elgate_wait(fd, tickets[0], 4, 5));
    try testing.expectEqual(errno(.IO), library.elgate_wait(fd, tickets[0] ^ (1 << 56), 1, 5));
    fixture.daemon.pause(false);
    for (tickets) |ticket| {
        for (0..4) |level| try testing.expectEqual(0, library.elgate_wait(fd, ticket, @intCast(level), -1));
    }
    try testing.expectEqual(0, harness.offsetOf(fd));
    try fixture.expectContents("file", "abcabcabc");
    try testing.expectEqual(0, harness.close(fd));
}

test "a level is the highest that is reached with all below it" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    try testing.expectEqual(1, harness.write(fd, "x"));
    try testing.expectEqual(0, library.elgate_drain(fd));
    fixture.daemon.pause(true);
    var ticket: u64 = undefined;
    try testing.expectEqual(0, library.elgate_append(fd, "abc", 3, &ticket));
    const line = fixture.daemon.routePositions(0);
    const before = line.logged;
    const behind = before + 1;
    const cases = [_]struct { logged: bool, durable: bool, applied: bool, level: c_int }{
        .{ .logged = false, .durable = false, .applied = false, .level = 0 },
        .{ .logged = true, .durable = false, .applied = false, .level = 1 },
        .{ .logged = true, .durable = true, .applied = false, .level = 2 },
        .{ .logged = true, .durable = false, .applied = true, .level = 1 },
        .{ .logged = true, .durable = true, .applied = true, .level = 3 },
    };
    for (cases) |case| {
        @atomicStore(u64, &line.logged, if (case.logged) behind else before, .seq_cst);
        @atomicStore(u64, &line.durable, if (case.durable) behind else before, .seq_cst);
        @atomicStore(u64, &line.applied, if (case.applied) behind else before, .seq_cst);
        try testing.expectEqual(case.level, library.elgate_level(fd, ticket));
    }
    // Its file has an error that nobody has been told: then the record is not in it.
    const state = fixture.daemon.handleState(0);
    @atomicStore(i32, &state.error_errno, @intFromEnum(E.NOSPC), .seq_cst);
    _ = @atomicRmw(u32, &state.error_sequence, .Add, 1, .seq_cst);
    try testing.expectEqual(2, library.elgate_level(fd, ticket));
    try testing.expectEqual(errno(.INVAL), library.elgate_level(fd, 0));
    try testing.expectEqual(errno(.IO), library.elgate_level(fd, ticket ^ (1 << 56)));
    try testing.expectEqual(harness.native, library.elgate_level(-1, ticket));
    fixture.daemon.pause(false);
    try testing.expectEqual(errno(.NOSPC), library.elgate_fsync(fd));
    try testing.expectEqual(3, library.elgate_level(fd, ticket));
    try testing.expectEqual(0, harness.close(fd));
}

test "where a route syncs late, whoever waits for durable asks at once" {
    const fixture = try Fixture.init(&.{
        .{ .name = "late", .pattern = "/late", .flags = .{ .durable_when_asked = true } },
        .{ .name = "soon", .pattern = "/soon" },
    });
    defer fixture.deinit();
    for ([_][]const u8{ "late", "soon" }, 0..) |name, route| {
        const fd = try fixture.create(name, true);
        try testing.expectEqual(1, harness.write(fd, "x"));
        try testing.expectEqual(0, library.elgate_drain(fd));
        fixture.daemon.pause(true);
        const before = fixture.daemon.count("barriers");
        var ticket: u64 = undefined;
        try testing.expectEqual(0, library.elgate_append(fd, "abc", 3, &ticket));
        for ([_]c_int{ 1, 3 }) |level| try testing.expectEqual(errno(.TIMEDOUT), library.elgate_wait(fd, ticket, level, 0));
        try testing.expectEqual(errno(.TIMEDOUT), library.elgate_wait(fd, ticket, 2, 0));
        fixture.daemon.pause(false);
        try testing.expectEqual(0, library.elgate_wait(fd, ticket, 2, -1));
        const asked = fixture.daemon.count("barriers") - before;
        try testing.expectEqual(0, library.elgate_drain(fd));
        if (route == 0) try testing.expect(asked > 0) else try testing.expectEqual(0, asked);
        // What is durable already is not asked for.
        const done = fixture.daemon.count("barriers");
        try testing.expectEqual(0, library.elgate_wait(fd, ticket, 2, -1));
        try testing.expectEqual(done, fixture.daemon.count("barriers"));

        // Nobody else has it open: else the positions alone tell.
        const state = fixture.daemon.handleState(@intCast(route));
        @atomicStore(u32, &state.file_handles, 1, .seq_cst);
        try testing.expectEqual(1, harness.write(fd, "y"));
        try testing.expectEqual(0, library.elgate_fsync(fd));
        const synced = fixture.daemon.count("barriers") - done;
        try testing.expectEqual(@as(u64, if (route == 0) 1 else 0), synced);
        // A reload has changed the route since the file was opened.
        @atomicStore(u32, &fixture.daemon.routePositions(@intCast(route)).durable_when_asked, 1, .seq_cst);
        try testing.expectEqual(1, harness.write(fd, "z"));
        try testing.expectEqual(0, library.elgate_fsync(fd));
        try testing.expectEqual(done + synced + 1, fixture.daemon.count("barriers"));
        try testing.expectEqual(0, harness.close(fd));
    }
}

test "F_SETFL is noticed" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const fd = try fixture.create("file", true);
    try testing.expectEqual(3, harness.write(fd, "abc"));
    _ = fake.check(linux.fcntl(fd, linux.F.SETFL, 0));
    try testing.expectEqual(0, library.elgate_flags_changed(fd));
    try testing.expectEqual(3, harness.offsetOf(fd));
    _ = fake.check(linux.lseek(fd, 0, linux.SEEK.SET));
    try testing.expectEqual(1, harness.write(fd, "A"));
    _ = fake.check(linux.fcntl(fd, linux.F.SETFL, @as(u32, @bitCast(linux.O{ .APPEND = true }))));
    try testing.expectEqual(0, library.elgate_flags_changed(fd));
    try testing.expectEqual(1, harness.write(fd, "d"));
    try testing.expectEqual(0, library.elgate_drain(fd));
    try fixture.expectContents("file", "Abcd");
    try testing.expectEqual(0, harness.close(fd));
}

test "routes that change are seen by the next open" {
    const fixture = try Fixture.init(&.{.{ .name = "a", .pattern = "/a-*" }});
    defer fixture.deinit();
    const before = try fixture.open("b-1", .{ .ACCMODE = .WRONLY, .CREAT = true });
    try testing.expectEqual(0, before.routed);
    _ = linux.close(before.fd);
    fixture.daemon.setRoutes(&.{ .{ .name = "b", .pattern = "/b-*" }, .{ .name = "a", .pattern = "/a-*" } });
    try testing.expectEqual(1, library.elgate_path_is_routed(&fixture.path("b-2")));
    const fd = try fixture.create("b-1", false);
    try testing.expectEqual(1, harness.write(fd, "x"));
    try testing.expectEqual(0, library.elgate_fsync(fd));
    try testing.expectEqual(0, harness.close(fd));
}

test "RLIMIT_FSIZE is the kernel's business: near it the file goes native" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    var before: linux.rlimit = undefined;
    _ = fake.check(linux.prlimit(0, .FSIZE, null, &before));
    const low = linux.rlimit{ .cur = 64 << 20, .max = before.max };
    _ = fake.check(linux.prlimit(0, .FSIZE, &low, null));
    defer _ = linux.prlimit(0, .FSIZE, &before, null);
    const fd = try fixture.create("file", false);
    try testing.expectEqual(1, harness.write(fd, "x"));
    try testing.expectEqual(1, library.elgate_pwrite(fd, "x", 1, (64 << 20) - 1));
    try testing.expectEqual(0, library.elgate_ftruncate(fd, 1));
    try testing.expectEqual(harness.native, library.elgate_pwrite(fd, "xy", 2, (64 << 20) - 1));
    try testing.expectEqual(107, harness.status().last_fallback_reason);
    try testing.expectEqual(0, harness.close(fd));
    const log = try fixture.create("log", true);
    try testing.expectEqual(1, harness.write(log, "x"));
    try testing.expectEqual(harness.native, library.elgate_ftruncate(log, (64 << 20) + 1));
    try testing.expectEqual(0, harness.close(log));
}

test "a change of a marked file's name is said before it is made, and of no other" {
    const fixture = try Fixture.init(&everything);
    defer fixture.deinit();
    const daemon = fixture.daemon;
    var name: [control.name_bytes_max + 1]u8 = undefined;
    const here = fixture.path("here");
    const there = fixture.path("there");
    const fd = try fixture.create("here", false);
    // Not registered yet: nothing of it is in any log.
    try testing.expectEqual(0, library.elgate_before_rename(&here, &there));
    try testing.expectEqual(0, library.elgate_before_unlink(&here));
    try testing.expectEqual(1, harness.write(fd, "x"));
    try testing.expectEqual(1, library.elgate_before_rename(&here, &there));
    try testing.expectEqual(1, daemon.count("names_moved"));
    try testing.expectEqualStrings("there", daemon.lastName(&name));
    _ = fake.check(linux.rename(&here, &there));
    // Whoever has it open: the mark tells.
    try testing.expectEqual(0, harness.close(fd));
    try testing.expectEqual(1, library.elgate_before_unlink(&there));
    try testing.expectEqual(1, daemon.count("names_removed"));
    // What it would take the place of goes; a name that is the same goes nowhere.
    const plain = fixture.path("plain");
    _ = linux.close(@intCast(fake.check(linux.open(&plain, .{ .ACCMODE = .WRONLY, .CREAT = true }, 0o600))));
    try testing.expectEqual(1, library.elgate_before_rename(&plain, &there));
    try testing.expectEqual(2, daemon.count("names_removed"));
    try testing.expectEqual(1, daemon.count("names_moved"));
    try testing.expectEqual(1, library.elgate_before_rename(&there, &there));
    try testing.expectEqual(2, daemon.count("names_removed"));
    try testing.expectEqual(2, daemon.count("names_moved"));
    // The native call says it better.
    try testing.expectEqual(0, library.elgate_before_rename(&fixture.path("absent"), &plain));
    try testing.expectEqual(0, library.elgate_before_rename(&there, &fixture.path("absent/there")));
    // A directory, but none that no route can be below.
    const directory = fixture.path("directory");
    _ = fake.check(linux.mkdir(&directory, 0o700));
    try testing.expectEqual(1, library.elgate_before_rename(&directory, &fixture.path("moved/")));
    try testing.expectEqualStrings("moved", daemon.lastName(&name));
    // Refused: it must not be done.
    @atomicStore(u32, &daemon.refuse, @intFromEnum(control.Refusal.log_failed), .seq_cst);
    try testing.expectEqual(errno(.NOSPC), library.elgate_before_unlink(&there));
    try testing.expectEqual(errno(.NOSPC), library.elgate_before_rename(&there, &here));
    try testing.expectEqual(0, library.elgate_before_unlink(&plain));
}

test "directories that no route's files can be below are renamed without a word" {
    const fixture = try Fixture.init(&.{.{ .name = "logs", .pattern = "/logs/*.log" }});
    defer fixture.deinit();
    for ([_][]const u8{ "logs", "other" }, [_]c_int{ 1, 0 }) |name, expected| {
        const directory = fixture.path(name);
        _ = fake.check(linux.mkdir(&directory, 0o700));
        try testing.expectEqual(expected, library.elgate_before_rename(&directory, &fixture.path("new")));
    }
}
