//! The daemon's side of the positions memory: the only place that writes it, and the only mapping that can.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const positions = @import("../format/positions.zig");
const os = @import("os.zig");
const Failure = @import("failure.zig").Failure;

const initRobustMutex = @import("ring_memory.zig").initRobustMutex;

extern "c" fn pthread_mutex_lock(mutex: *anyopaque) c_int;
extern "c" fn pthread_mutex_unlock(mutex: *anyopaque) c_int;

const F_ADD_SEALS = 1033;
const F_SEAL_SEAL = 0x1;
const F_SEAL_SHRINK = 0x2;
const F_SEAL_GROW = 0x4;
const F_SEAL_FUTURE_WRITE = 0x10;

pub const Publisher = struct {
    fd: i32,
    memory: []align(std.heap.page_size_min) u8,

    pub fn init(failure: *Failure) error{Failed}!Publisher {
        const fd = switch (os.descriptor(linux.memfd_create("elgate-positions", linux.MFD.CLOEXEC | linux.MFD.ALLOW_SEALING))) {
            .fd => |fd| fd,
            .errno => |errno| return failure.set(errno, "cannot make the positions memory (memfd_create): {s}", .{Failure.nameOf(errno)}),
        };
        errdefer os.close(fd);
        if (os.check(linux.ftruncate(fd, positions.file_size)).err() != 0) return failure.set(@intFromEnum(linux.E.NOMEM), "cannot size the positions memory to {d} bytes: the host is short of memory", .{positions.file_size});
        const memory = switch (os.check(linux.mmap(null, positions.file_size, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED }, fd, 0))) {
            .value => |address| @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(address))[0..positions.file_size],
            .errno => |errno| return failure.set(errno, "cannot map the positions memory: {s}", .{Failure.nameOf(errno)}),
        };
        // From here on nobody who gets this descriptor can map it for writing.
        const seals = F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
        const sealed = os.check(linux.fcntl(fd, F_ADD_SEALS, seals));
        if (sealed.err() != 0) return failure.set(sealed.err(), "cannot seal the positions memory: {s}. Elgate needs Linux 5.1 or later", .{Failure.nameOf(sealed.err())});

        const publisher = Publisher{ .fd = fd, .memory = memory };
        publisher.header().* = .{
            .magic = positions.magic,
            .version = positions.version,
            .reserved_0 = 0,
            .daemon_epoch = os.randomU64() | 1,
            .routes_generation = 0,
            .marks_generation = 0,
            .scanned = 0,
            .sole_route = positions.no_sole_route,
            .server = @splat(0),
        };
        initRobustMutex(&publisher.header().server);
        return publisher;
    }

    pub fn deinit(publisher: *Publisher) void {
        _ = linux.munmap(publisher.memory.ptr, publisher.memory.len);
        os.close(publisher.fd);
    }

    /// The worker, for as long as it serves: what stands here is kept up to date.
    pub fn beginServing(publisher: Publisher) void {
        assert(pthread_mutex_lock(&publisher.header().server) == 0);
    }

    pub fn endServing(publisher: Publisher) void {
        assert(pthread_mutex_unlock(&publisher.header().server) == 0);
    }

    pub fn header(publisher: Publisher) *positions.Header {
        return @ptrCast(publisher.memory.ptr);
    }

    pub fn route(publisher: Publisher, index: u32) *positions.RoutePositions {
        assert(index < positions.routes_max);
        const lines: [*]positions.RoutePositions = @ptrCast(@alignCast(publisher.memory.ptr + positions.routes_offset));
        return &lines[index];
    }

    pub fn handle(publisher: Publisher, index: u32) *positions.HandleState {
        assert(index < positions.handles_max);
        const states: [*]positions.HandleState = @ptrCast(@alignCast(publisher.memory.ptr + positions.handles_offset));
        return &states[index];
    }

    /// Moves a route's positions (each only forward) and wakes those whom that satisfies, once.
    pub fn publish(publisher: Publisher, index: u32, logged: u64, durable: u64, applied: u64) void {
        const line = publisher.route(index);
        assert(logged >= durable and logged >= line.logged and durable >= line.durable and applied >= line.applied);
        if (logged == line.logged and durable == line.durable and applied == line.applied) return;
        // Whoever waits for several levels is satisfied by the last of them, which moves past it now.
        const mask = positions.wakeMask(line.logged, logged) | positions.wakeMask(line.durable, durable) | positions.wakeMask(line.applied, applied);
        @atomicStore(u64, &line.logged, logged, .release);
        @atomicStore(u64, &line.durable, durable, .release);
        @atomicStore(u64, &line.applied, applied, .release);
        publisher.wake(line, mask);
    }

    /// Whether the route takes what brings new data. Who waits for that looks again when it does.
    pub fn setClosed(publisher: Publisher, index: u32, closed: bool) void {
        @atomicStore(u32, &publisher.route(index).closed, @intFromBool(closed), .release);
        if (!closed) publisher.wakeAll(index);
    }

    /// Wakes everybody who waits on this route, to look at an error.
    pub fn wakeAll(publisher: Publisher, index: u32) void {
        publisher.wake(publisher.route(index), std.math.maxInt(u32));
    }

    fn wake(publisher: Publisher, line: *positions.RoutePositions, mask: u32) void {
        _ = publisher;
        // seq_cst: the positions above are seen by whoever sees the new generation, and a waiter that
        // compared the old one is either asleep (woken below) or is refused the sleep by the kernel.
        _ = @atomicRmw(u32, &line.generation, .Add, 1, .seq_cst);
        os.futexWakeBits(&line.generation, mask);
    }
};
