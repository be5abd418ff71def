//! libelgate_core.so: the engine behind the C ABI of include/elgate_core.h. Nothing but translation here.

const std = @import("std");
const builtin = @import("builtin");
const linux = std.os.linux;
const Failure = @import("engine/failure.zig").Failure;
const engine_module = @import("engine/engine.zig");
const counters = @import("engine/counters.zig");
const steps = @import("engine/steps.zig");
const Engine = engine_module.Engine;

/// malloc: the daemon's Python lives in the same process, and nothing here allocates on a data path.
const allocator = std.heap.c_allocator;

pub const RouteConfig = extern struct {
    name: [*:0]const u8,
    pattern: [*:0]const u8,
    flush: u32,
    flush_interval_ms: u32,
    visibility: u32,
    on_full: u32,
    segment_bytes: u64,
    log_bytes_max: u64,
};

pub const EngineConfig = extern struct {
    control_socket: [*:0]const u8,
    control_mode: u32,
    control_gid: i32,
    ring_path: [*:0]const u8,
    log_directory: [*:0]const u8,
    flags: u32,
    route_count: u32,
    routes: ?[*]const RouteConfig,
    log_age_max_ms: u64,
    checkpoint_bytes: u64,
    checkpoint_interval_ms: u32,
    reserved: u32,
    progress: ?*const fn (route: [*:0]const u8, done_bytes: u64, total_bytes: u64) callconv(.c) void,
};

pub const flag_allow_volatile: u32 = 1;
pub const flag_null_sink: u32 = 2;
pub const flag_io_uring: u32 = 4;
pub const flag_ring_per_client: u32 = 8;

pub const flush_group: u32 = 0;
pub const flush_always: u32 = 1;
pub const flush_interval: u32 = 2;
pub const flush_none: u32 = 3;
pub const flush_interval_ms_max: u32 = 60_000;

pub const visibility_immediate: u32 = 1;
pub const on_full_error: u32 = 1;

const EINVAL: c_int = @intFromEnum(linux.E.INVAL);

fn fail(failure: *const Failure, error_text: ?[*]u8, error_bytes: usize) c_int {
    if (error_text) |destination| {
        if (error_bytes > 0) {
            const message = failure.message();
            const length = @min(message.len, error_bytes - 1);
            @memcpy(destination[0..length], message[0..length]);
            destination[length] = 0;
        }
    }
    std.debug.assert(failure.errno > 0);
    return -failure.errno;
}

fn convertRoutes(given: ?[*]const RouteConfig, count: u32, failure: *Failure) error{Failed}![]engine_module.RouteSettings {
    const settings = allocator.alloc(engine_module.RouteSettings, count) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for {d} routes", .{count});
    errdefer allocator.free(settings);
    for (settings, 0..) |*one, i| {
        const route = given.?[i];
        if (route.flush > flush_none) return failure.set(EINVAL, "route {s}: {d} is not a flush mode", .{ route.name, route.flush });
        const interval_allowed = if (route.flush == flush_interval) route.flush_interval_ms > 0 and route.flush_interval_ms <= flush_interval_ms_max else route.flush_interval_ms == 0;
        if (!interval_allowed) return failure.set(EINVAL, "route {s}: flush_interval_ms is {d}; it must be from 1 to {d} for ELGATE_FLUSH_INTERVAL, and 0 else", .{ route.name, route.flush_interval_ms, flush_interval_ms_max });
        if (route.segment_bytes == 0 or route.segment_bytes % (1 << 20) != 0) return failure.set(EINVAL, "route {s}: segment_size must be a multiple of 1 MiB, not {d} bytes", .{ route.name, route.segment_bytes });
        one.* = .{
            .name = std.mem.span(route.name),
            .pattern = std.mem.span(route.pattern),
            .flags = .{
                .flush_always = route.flush == flush_always,
                .visibility_immediate = route.visibility == visibility_immediate,
                .on_full_error = route.on_full == on_full_error,
                .durable_when_asked = route.flush == flush_interval or route.flush == flush_none,
            },
            .flush = switch (route.flush) {
                flush_interval => .everyNs(@as(u64, route.flush_interval_ms) * std.time.ns_per_ms),
                flush_none => .when_asked,
                else => .each_group,
            },
            .segment_bytes = route.segment_bytes,
            .log_bytes_max = route.log_bytes_max,
        };
    }
    return settings;
}

pub export fn elgate_engine_start(config: *const EngineConfig, engine: **Engine, error_text: ?[*]u8, error_bytes: usize) c_int {
    var failure = Failure{};
    engine.* = startEngine(config, &failure) catch return fail(&failure, error_text, error_bytes);
    return 0;
}

fn startEngine(config: *const EngineConfig, failure: *Failure) error{Failed}!*Engine {
    const routes = try convertRoutes(config.routes, config.route_count, failure);
    defer allocator.free(routes);
    return Engine.start(allocator, &.{
        .control_socket = std.mem.span(config.control_socket),
        .control_mode = config.control_mode,
        .control_gid = config.control_gid,
        .ring_path = std.mem.span(config.ring_path),
        .log_directory = std.mem.span(config.log_directory),
        .allow_volatile = config.flags & flag_allow_volatile != 0,
        .disk_engine = if (config.flags & flag_io_uring != 0) .io_uring else .lanes,
        .ring_per_client = config.flags & flag_ring_per_client != 0,
        .null_sink = config.flags & flag_null_sink != 0,
        .no_sync = steps.syncsAreLeftOut(),
        .log_age_max_ns = config.log_age_max_ms *| std.time.ns_per_ms,
        .checkpoint_bytes = if (config.checkpoint_bytes != 0) config.checkpoint_bytes else 64 << 20,
        .checkpoint_interval_ms = if (config.checkpoint_interval_ms != 0) config.checkpoint_interval_ms else 5000,
        .routes = routes,
        .progress = config.progress,
    }, failure);
}

pub export fn elgate_engine_set_routes(engine: *Engine, given: ?[*]const RouteConfig, count: u32, error_text: ?[*]u8, error_bytes: usize) c_int {
    var failure = Failure{};
    const routes = convertRoutes(given, count, &failure) catch return fail(&failure, error_text, error_bytes);
    defer allocator.free(routes);
    engine.setRoutes(routes, &failure) catch return fail(&failure, error_text, error_bytes);
    return 0;
}

pub export fn elgate_engine_stop(engine: *Engine, timeout_ms: i64) c_int {
    const drained = engine.stop(@as(u64, @intCast(@max(timeout_ms, 0))) * std.time.ns_per_ms);
    return if (drained) 0 else -@as(c_int, @intFromEnum(linux.E.TIMEDOUT));
}

pub export fn elgate_engine_free(engine: *Engine) void {
    engine.destroy();
}

pub export fn elgate_engine_next_event(engine: *Engine, buffer: [*]u8, buffer_bytes: usize, timeout_ms: i64) c_int {
    const timeout_ns = @as(u64, @intCast(@max(timeout_ms, 0))) * std.time.ns_per_ms;
    const length = engine.state.events.next(buffer[0..buffer_bytes], timeout_ns) orelse return -@as(c_int, @intFromEnum(linux.E.PIPE));
    return @intCast(length);
}

pub export fn elgate_engine_counter_count() u32 {
    return counters.count;
}

pub export fn elgate_engine_counter_name(index: u32) ?[*:0]const u8 {
    return if (index < counters.count) counters.name(index).ptr else null;
}

pub export fn elgate_engine_counters(engine: *Engine, values: [*]u64, count: u32) c_int {
    const filled = @min(count, counters.count);
    for (0..filled) |i| values[i] = @atomicLoad(u64, &engine.state.counters.values[i], .monotonic);
    return @intCast(filled);
}

pub export fn elgate_core_version() [*:0]const u8 {
    return "0.1.0 zig " ++ builtin.zig_version_string ++ " " ++ @tagName(builtin.mode) ++ " " ++ @tagName(builtin.cpu.arch);
}

/// A broken invariant: say where, and end; the ring and the log are as they were, the next daemon goes on.
pub const panic = std.debug.FullPanic(std.debug.defaultPanic);
