//! libelgate_core.so: the engine behind the C ABI of include/elgate_core.h. Nothing but translation here.

const std = @import("std");
const builtin = @import("builtin");
const linux = std.os.linux;
const Failure = @import("engine/failure.zig").Failure;
const engine_module = @import("engine/engine.zig");
const counters = @import("engine/counters.zig");
const steps = @import("engine/steps.zig");
const stub_module = @import("engine/stub.zig");
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
    stub_path: ?[*:0]const u8,
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

/// In the test stub each fsync must be seen: it is asked for, on whatever route.
fn convertRoutes(given: ?[*]const RouteConfig, count: u32, in_stub: bool, failure: *Failure) error{Failed}![]engine_module.RouteSettings {
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
                .durable_when_asked = in_stub or route.flush == flush_interval or route.flush == flush_none,
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
    const routes = try convertRoutes(config.routes, config.route_count, config.stub_path != null, failure);
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
        .stub_path = if (config.stub_path) |path| std.mem.span(path) else null,
        .log_age_max_ns = config.log_age_max_ms *| std.time.ns_per_ms,
        .checkpoint_bytes = if (config.checkpoint_bytes != 0) config.checkpoint_bytes else 64 << 20,
        .checkpoint_interval_ms = if (config.checkpoint_interval_ms != 0) config.checkpoint_interval_ms else 5000,
        .routes = routes,
        .progress = config.progress,
    }, failure);
}

pub export fn elgate_engine_set_routes(engine: *Engine, given: ?[*]const RouteConfig, count: u32, error_text: ?[*]u8, error_bytes: usize) c_int {
    var failure = Failure{};
    const routes = convertRoutes(given, count, engine.state.stub != null, &failure) catch return fail(&failure, error_text, error_bytes);
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

pub const StubRule = extern struct {
    point: u32,
    err: i32,
    skip: u32,
    times: u32,
    path: ?[*:0]const u8,
    route: ?[*:0]const u8,
};

pub const StubOperation = extern struct {
    kind: u32,
    flags: u32,
    session: u64,
    offset: u64,
    length: u64,
    time_ns: u64,
    err: i32,
    process_id: u32,
    thread_id: u32,
    path_length: u32,
    route_length: u32,
    data_length: u32,
    text: ?[*]const u8,
};

pub const StubState = extern struct {
    served: u32,
    stalled: u32,
    failing: u32,
    reserved: u32,
    recorded_bytes: u64,
    recording_bytes_max: u64,
    dropped: u64,
};

fn negative(errno: i32) c_int {
    return -errno;
}

pub export fn elgate_stub_open(path: [*:0]const u8, table: **stub_module.Table) c_int {
    const opened = switch (stub_module.Table.open(path)) {
        .table => |opened| opened,
        .errno => |errno| return negative(errno),
    };
    const kept = allocator.create(stub_module.Table) catch {
        opened.close();
        return negative(@intFromEnum(linux.E.NOMEM));
    };
    kept.* = opened;
    table.* = kept;
    return 0;
}

pub export fn elgate_stub_close(table: *stub_module.Table) void {
    table.close();
    allocator.destroy(table);
}

pub export fn elgate_stub_settle(table: *stub_module.Table, timeout_ms: i64) c_int {
    return negative(table.settle(nanoseconds(timeout_ms)));
}

pub export fn elgate_stub_add_rule(table: *stub_module.Table, rule: *const StubRule) c_int {
    var made = std.mem.zeroes(stub_module.Rule);
    made.point = @enumFromInt(rule.point);
    made.errno = rule.err;
    made.skip = rule.skip;
    made.times = rule.times;
    if (rule.path) |path| {
        const text = std.mem.span(path);
        if (text.len > made.path.len) return negative(@intFromEnum(linux.E.NAMETOOLONG));
        @memcpy(made.path[0..text.len], text);
        made.path_length = @intCast(text.len);
    }
    if (rule.route) |route| {
        const text = std.mem.span(route);
        if (text.len > made.route.len) return negative(@intFromEnum(linux.E.NAMETOOLONG));
        @memcpy(made.route[0..text.len], text);
        made.route_length = @intCast(text.len);
    }
    const index = table.addRule(&made) orelse return negative(@intFromEnum(linux.E.NOSPC));
    return @intCast(index);
}

pub export fn elgate_stub_remove_rule(table: *stub_module.Table, rule: u32) void {
    if (rule < stub_module.rules_max) table.removeRule(rule);
}

pub export fn elgate_stub_rule_hits(table: *stub_module.Table, rule: u32) i64 {
    if (rule >= stub_module.rules_max) return -@as(i64, EINVAL);
    return @atomicLoad(u32, &table.header.rules[rule].hits, .seq_cst);
}

pub export fn elgate_stub_await_hits(table: *stub_module.Table, rule: u32, hits: u32, timeout_ms: i64) c_int {
    if (rule >= stub_module.rules_max) return negative(EINVAL);
    return negative(table.awaitHits(rule, hits, nanoseconds(timeout_ms)));
}

pub export fn elgate_stub_read(table: *stub_module.Table, at: u64, operation: *StubOperation, buffer: [*]align(8) u8, buffer_bytes: usize) i64 {
    const length = table.read(at, buffer[0..buffer_bytes]);
    if (length <= 0) return length;
    const record: *const stub_module.Record = @ptrCast(buffer);
    operation.* = .{
        .kind = @intFromEnum(record.kind),
        .flags = record.flags,
        .session = record.session,
        .offset = record.offset,
        .length = record.length,
        .time_ns = record.time_ns,
        .err = record.errno,
        .process_id = record.process_id,
        .thread_id = record.thread_id,
        .path_length = record.path_length,
        .route_length = record.route_length,
        .data_length = record.data_length,
        .text = buffer + @sizeOf(stub_module.Record),
    };
    return length;
}

pub export fn elgate_stub_forget(table: *stub_module.Table) void {
    table.forget();
}

pub export fn elgate_stub_limit(table: *stub_module.Table, recording_bytes_max: u64) void {
    @atomicStore(u64, &table.header.recording_bytes_max, recording_bytes_max, .seq_cst);
}

pub export fn elgate_stub_state(table: *stub_module.Table, state: *StubState) void {
    const header = table.header;
    state.* = .{
        .served = @intFromBool(table.isServed()),
        .stalled = @atomicLoad(u32, &header.stalled, .seq_cst),
        .failing = @atomicLoad(u32, &header.failing, .seq_cst),
        .reserved = 0,
        .recorded_bytes = @atomicLoad(u64, &header.recorded_bytes, .seq_cst),
        .recording_bytes_max = @atomicLoad(u64, &header.recording_bytes_max, .seq_cst),
        .dropped = @atomicLoad(u64, &header.dropped, .seq_cst),
    };
}

fn nanoseconds(timeout_ms: i64) u64 {
    return @as(u64, @intCast(@max(timeout_ms, 0))) *| std.time.ns_per_ms;
}

pub export fn elgate_core_version() [*:0]const u8 {
    return "0.1.0 zig " ++ builtin.zig_version_string ++ " " ++ @tagName(builtin.mode) ++ " " ++ @tagName(builtin.cpu.arch);
}

/// A broken invariant: say where, and end; the ring and the log are as they were, the next daemon goes on.
pub const panic = std.debug.FullPanic(std.debug.defaultPanic);
