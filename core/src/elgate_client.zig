//! libelgate_client.so: the functions of include/elgate_client.h, and nothing else. What they do stands in client/.

const std = @import("std");
const linux = std.os.linux;
const files = @import("client/files.zig");
const names = @import("client/names.zig");
const path_module = @import("client/path.zig");
const session_module = @import("client/session.zig");
const system = @import("client/system.zig");
const wait = @import("client/wait.zig");
const session = &session_module.process;

/// struct elgate_client_status.
pub const Status = extern struct {
    connected: u32,
    disabled: u32,
    routed_files: u64,
    routed_operations: u64,
    routed_bytes: u64,
    native_bytes: u64,
    native_fallbacks: u64,
    registrations: u64,
    reconnects: u64,
    full_ring_waits: u64,
    late_wakes: u64,
    last_fallback_reason: u64,
    test_stub: u64,
};

pub export fn elgate_start(runtime: ?[*:0]const u8) c_int {
    files.prepare() catch |err| {
        return system.negative(if (err == error.OutOfMemory) .NOMEM else .DEADLK);
    };
    return session.start(if (runtime) |name| std.mem.span(name) else "", files.listener);
}

pub export fn elgate_answer_signals() void {
    @atomicStore(bool, &wait.signals_end_waits, true, .monotonic);
}

pub export fn elgate_path_is_routed(path: ?[*:0]const u8) c_int {
    session.checkFork();
    switch (session.currentState()) {
        .connected, .lost => {},
        .idle, .disabled => return 0,
        // A process that a daemon has served, and no longer does, must still not write past its log.
        .passthrough => if (!session.hasTable()) return 0,
    }
    var buffer: path_module.Buffer = undefined;
    const resolved = path_module.resolve(path orelse return 0, &buffer) orelse return 0;
    return if (session.match(resolved) == null) 0 else 1;
}

pub export fn elgate_opened(fd: c_int, path: ?[*:0]const u8, flags: c_int) c_int {
    _ = path; // the kernel knows the descriptor's true path better
    if (fd < 0) return 0;
    return files.opened(fd, @bitCast(flags));
}

pub export fn elgate_is_routed(fd: c_int) c_int {
    return files.isRouted(fd);
}

pub export fn elgate_write(fd: c_int, buffer: ?*const anyopaque, length_bytes: usize) i64 {
    const vector = files.Vector{ .base = @ptrCast(buffer), .length = length_bytes };
    return files.write(fd, &.{vector}, null);
}

pub export fn elgate_writev(fd: c_int, vectors: ?[*]const files.Vector, count: c_int) i64 {
    return writeVectors(fd, vectors, count, null);
}

pub export fn elgate_pwrite(fd: c_int, buffer: ?*const anyopaque, length_bytes: usize, offset: i64) i64 {
    const vector = files.Vector{ .base = @ptrCast(buffer), .length = length_bytes };
    return files.write(fd, &.{vector}, offset);
}

pub export fn elgate_pwritev(fd: c_int, vectors: ?[*]const files.Vector, count: c_int, offset: i64) i64 {
    return writeVectors(fd, vectors, count, offset);
}

fn writeVectors(fd: c_int, vectors: ?[*]const files.Vector, count: c_int, offset: ?i64) i64 {
    if (files.isRouted(fd) == 0) {
        // Counts what goes by natively; says so without looking at the vectors where it is not ours at all.
        if (count < 0 or count > files.vectors_max or vectors == null) return files.native;
    }
    if (count < 0 or count > files.vectors_max) return system.negative(.INVAL);
    if (count > 0 and vectors == null) return system.negative(.FAULT);
    return files.write(fd, if (count == 0) &.{} else vectors.?[0..@intCast(count)], offset);
}

pub export fn elgate_fsync(fd: c_int) c_int {
    return files.fsync(fd);
}

pub export fn elgate_ftruncate(fd: c_int, length_bytes: i64) c_int {
    return files.ftruncate(fd, length_bytes);
}

pub export fn elgate_fallocate(fd: c_int, mode: c_int, offset: i64, length_bytes: i64) c_int {
    return files.fallocate(fd, mode, offset, length_bytes);
}

pub export fn elgate_drain(fd: c_int) c_int {
    return files.drain(fd);
}

pub export fn elgate_drain_all() c_int {
    return files.drainAll(-1);
}

pub export fn elgate_drain_all_within(timeout_ms: i64) c_int {
    const before = wait.ignoreSignals();
    defer wait.resumeSignals(before);
    return files.drainAll(timeout_ms);
}

pub export fn elgate_close(fd: c_int) c_int {
    return files.close(fd);
}

pub export fn elgate_duplicated(fd: c_int, copy: c_int) c_int {
    return files.duplicated(fd, copy);
}

pub export fn elgate_flags_changed(fd: c_int) c_int {
    return files.flagsChanged(fd);
}

pub export fn elgate_go_native(fd: c_int, reason: c_int) c_int {
    return files.goNative(fd, @enumFromInt(@as(u32, @bitCast(reason))));
}

pub export fn elgate_before_rename(old: ?[*:0]const u8, new: ?[*:0]const u8) c_int {
    return names.beforeRename(old orelse return 0, new orelse return 0);
}

pub export fn elgate_before_unlink(path: ?[*:0]const u8) c_int {
    return names.beforeUnlink(path orelse return 0);
}

pub export fn elgate_append(fd: c_int, buffer: ?*const anyopaque, length_bytes: usize, ticket: ?*u64) c_int {
    const where = ticket orelse return system.negative(.FAULT);
    const result = files.append(fd, .{ .base = @ptrCast(buffer), .length = length_bytes }, where);
    return if (result < 0) @intCast(result) else 0;
}

pub export fn elgate_wait(fd: c_int, ticket: u64, level: c_int, timeout_ms: i64) c_int {
    return files.awaitTicket(fd, ticket, @enumFromInt(level), timeout_ms);
}

pub export fn elgate_level(fd: c_int, ticket: u64) c_int {
    return files.levelOf(fd, ticket);
}

pub export fn elgate_before_fork() c_int {
    const before = wait.ignoreSignals();
    defer wait.resumeSignals(before);
    return files.drainAll(-1);
}

pub export fn elgate_after_fork_in_child() void {
    session.checkFork();
}

pub export fn elgate_thread_detach() void {
    files.detachThread();
}

pub export fn elgate_get_status(status: ?*Status) void {
    const out = status orelse return;
    session.checkFork();
    const state = session.currentState();
    const counters = &session.counters;
    out.* = .{
        .connected = @intFromBool(state == .connected),
        .disabled = @intFromBool(state == .disabled or state == .passthrough),
        .routed_files = @atomicLoad(u64, &counters.routed_files, .monotonic),
        .routed_operations = 0,
        .routed_bytes = 0,
        .native_bytes = @atomicLoad(u64, &counters.native_bytes, .monotonic),
        .native_fallbacks = @atomicLoad(u64, &counters.native_fallbacks, .monotonic),
        .registrations = @atomicLoad(u64, &counters.registrations, .monotonic),
        .reconnects = @atomicLoad(u64, &counters.reconnects, .monotonic),
        .full_ring_waits = @atomicLoad(u64, &counters.full_ring_waits, .monotonic),
        .late_wakes = @atomicLoad(u64, &counters.late_wakes, .monotonic),
        .last_fallback_reason = @atomicLoad(u64, &counters.last_fallback_reason, .monotonic),
        .test_stub = @intFromBool(state == .connected and session.serves_test_stub),
    };
    for (&session.row_counters) |*row| {
        out.routed_operations += @atomicLoad(u64, &row.operations, .monotonic);
        out.routed_bytes += @atomicLoad(u64, &row.bytes, .monotonic);
    }
}

pub export fn elgate_stop() c_int {
    session.checkFork();
    switch (session.currentState()) {
        .connected, .lost => {},
        .idle, .disabled, .passthrough => {
            session.stop();
            return 0;
        },
    }
    const before = wait.ignoreSignals();
    defer wait.resumeSignals(before);
    const result = files.drainAll(-1);
    files.detachThread();
    session.stop();
    return result;
}
