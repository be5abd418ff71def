//! The worker: ring → log → files → positions, one thread, one batch at a time.
//!
//! ```
//! collect   copy what is committed from the ring into log buffers, one per route; resolve appends
//! apply     hand the batch's writes to the disk engine, which works on them while the next step waits
//! commit    one write per route, durable where the route or somebody who waits wants that; while it is in flight the
//!           next batch gathers in the ring
//! publish   positions, one wake per route
//! release   give the slots back
//! ```
//!
//! A batch may reach its files before its log write is done. Nothing is acknowledged before both are done,
//! and a daemon killed in between does it again to the same place: a write says where it goes, and for an
//! append the resolved offset is put into its slot before the file is touched.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const ring = @import("../format/ring.zig");
const positions = @import("../format/positions.zig");
const wal = @import("../format/wal.zig");
const checksum = @import("../format/checksum.zig");
const os = @import("os.zig");
const consumer_module = @import("consumer.zig");
const Item = consumer_module.Item;
const ring_memory = @import("ring_memory.zig");
const served_ring = @import("served_ring.zig");
const ServedRing = served_ring.ServedRing;
const HandleRef = served_ring.HandleRef;
const Line = served_ring.Line;
const rings_max = served_ring.rings_max;
const State = @import("state.zig").State;
const Route = @import("route.zig").Route;
const File = @import("files.zig").File;
const Buffer = @import("buffers.zig").Buffer;
const buffers_module = @import("buffers.zig");
const Buffers = buffers_module.Buffers;
const tails_module = @import("tails.zig");
const Tails = tails_module.Tails;
const syncs_module = @import("syncs.zig");
const Syncs = syncs_module.Syncs;
const Request = @import("requests.zig").Request;
const Uring = @import("uring.zig").Uring;
const applier_module = @import("disk/applier.zig");
const Applier = applier_module.Applier;
const lanes_module = @import("disk/lanes.zig");
const FileLanes = lanes_module.FileLanes;
const rewrite = @import("rewrite.zig");
const admission = @import("admission.zig");
const Failure = @import("failure.zig").Failure;
const steps = @import("steps.zig");
const quarantine = @import("quarantine.zig");
const names = @import("names.zig");
const checkpoints = @import("checkpoints.zig");
const sleep = @import("sleep.zig");
const release = @import("release.zig");
const Stub = @import("stub.zig").Stub;
const log_module = @import("wal/log.zig");

const retry_interval_ns = syncs_module.retry_interval_ns;
/// A target that goes on failing is tried less and less often: each attempt may write all of its window again.
const rewrite_pause_ns_max = 2 * std.time.ns_per_s;

/// Items of one ring in a row, before the next ring has its turn.
const turn_items_max = 64;

/// What replay found out, for the records that are still in rings.
pub const Recovered = struct {
    /// By ring, the positions that the log has.
    logged_positions: std.AutoHashMapUnmanaged([16]u8, std.AutoHashMapUnmanaged(u64, void)) = .empty,
    files: std.AutoHashMapUnmanaged(u64, *File) = .empty,
    /// Files that have lost their last name: nothing of them is missed.
    removed: std.AutoHashMapUnmanaged(u64, void) = .empty,
    /// Others that are not found, and that something in the log was for.
    lost: std.AutoHashMapUnmanaged(u64, void) = .empty,

    pub fn deinit(recovered: *Recovered, allocator: std.mem.Allocator) void {
        var sets = recovered.logged_positions.valueIterator();
        while (sets.next()) |set| set.deinit(allocator);
        recovered.logged_positions.deinit(allocator);
        recovered.files.deinit(allocator);
        recovered.removed.deinit(allocator);
        recovered.lost.deinit(allocator);
    }

    pub fn noteLogged(recovered: *Recovered, allocator: std.mem.Allocator, ring_uuid: [16]u8, position: u64) !void {
        const entry = try recovered.logged_positions.getOrPut(allocator, ring_uuid);
        if (!entry.found_existing) entry.value_ptr.* = .empty;
        try entry.value_ptr.put(allocator, position, {});
    }

    /// The positions of one ring; the caller's from here on.
    pub fn takeLogged(recovered: *Recovered, ring_uuid: [16]u8) std.AutoHashMapUnmanaged(u64, void) {
        const entry = recovered.logged_positions.fetchRemove(ring_uuid) orelse return .empty;
        return entry.value;
    }
};

pub const Worker = struct {
    state: *State,
    rings: [rings_max]*ServedRing = undefined,
    ring_count: u32 = 0,
    /// Whose turn it is first.
    first_ring: u32 = 0,
    /// Some ring's `required_scan` may not be reached: barriers wait.
    gated: bool = false,
    buffers: Buffers,
    tails: Tails,
    recovered: Recovered,
    uring: Uring = undefined,
    applier: Applier = undefined,
    /// Where checkpoints' syncs, and rewriting, are done.
    long_lanes: FileLanes = undefined,
    long_in_flight: u32 = 0,
    /// Files with operations that wait.
    deferring_files: u32 = 0,
    pending: ?*Request = null,
    /// Requests whose record is in a group that is not committed yet.
    awaiting_commit: ?*Request = null,
    releases: release.Releases = .{},
    syncs: Syncs = .{},
    known_files: std.ArrayListUnmanaged(*File) = .empty,
    failed_files: u32 = 0,
    sleeper: sleep.Sleeper = .{},
    /// Offers to the control thread that it has not answered.
    offers_open: u32 = 0,
    last_tick_ns: u64 = 0,
    lock_fd: i32,

    /// Routes with something under way, so that a thousand idle ones cost nothing.
    active: [positions.routes_max]*Route = undefined,
    active_count: u32 = 0,
    /// Some buffer of this batch has no room for another longest record: commit first.
    batch_full: bool = false,

    pub fn deinit(worker: *Worker) void {
        worker.buffers.deinit(worker.state.allocator);
        worker.tails.deinit();
        worker.recovered.deinit(worker.state.allocator);
        worker.known_files.deinit(worker.state.allocator);
    }

    pub fn init(state: *State, recovered: Recovered, lock_fd: i32, failure: *Failure) error{Failed}!Worker {
        return .{
            .state = state,
            .buffers = try Buffers.init(state.allocator, failure),
            .tails = try Tails.init(failure),
            .recovered = recovered,
            .lock_fd = lock_fd,
        };
    }

    /// Before `run`, or from within.
    pub fn serveRing(worker: *Worker, fresh: *ServedRing) void {
        assert(worker.ring_count < rings_max);
        assert(fresh.taken_over);
        fresh.logged_positions = worker.recovered.takeLogged(fresh.uuid);
        worker.publishStart(fresh);
        worker.rings[worker.ring_count] = fresh;
        worker.ring_count += 1;
    }

    pub fn served(worker: *const Worker) []const *ServedRing {
        return worker.rings[0..worker.ring_count];
    }

    /// The thread's body. `result` is 0, or the errno that io_uring refused with, once `ready` is set.
    pub fn run(worker: *Worker, result: *i32, ready: *std.Thread.ResetEvent) void {
        var errno: i32 = 0;
        if (worker.state.disk_engine == .io_uring) {
            worker.uring = Uring.init(1024, &errno) catch {
                result.* = errno;
                ready.set();
                return;
            };
            errno = worker.uring.registerDescriptor(worker.lock_fd);
            if (errno != 0) {
                result.* = errno;
                ready.set();
                return;
            }
        }
        worker.applier = .{ .engine = switch (worker.state.disk_engine) {
            .lanes => .{ .lanes = .{ .allocator = worker.state.allocator, .doorbell = &worker.state.doorbell, .perform = if (worker.state.stub != null) Stub.performRun else lanes_module.performRun } },
            .io_uring => .{ .io_uring = &worker.uring },
        }, .sink = .{ .context = worker, .applied = runApplied, .strayed = appendStrayed, .refused = fileRefused, .synced = queueSynced } };
        worker.long_lanes = .{ .allocator = worker.state.allocator, .doorbell = &worker.state.doorbell, .perform = if (worker.state.stub != null) Stub.performErrand else rewrite.perform };
        worker.syncs.init(worker);
        for (worker.served()) |each| each.publisher.beginServing();
        result.* = 0;
        ready.set();
        // Files that replay found have a lane from the start: what the ring still holds may name them.
        for (0..worker.state.routeCount()) |index| worker.knowReplayed(worker.state.route(@intCast(index)));
        worker.loop();
        for (worker.served()) |each| each.publisher.endServing();
        if (worker.isStuck()) return; // it ends with the process
        worker.long_lanes.deinit();
        worker.syncs.lanes.deinit();
        switch (worker.applier.engine) {
            .lanes => |*lanes| lanes.deinit(),
            .io_uring => |uring| uring.deinit(),
        }
    }

    /// After `run`: something hangs in a file system still, and looks at files and buffers.
    pub fn isStuck(worker: *const Worker) bool {
        return worker.applier.in_flight > 0 or worker.long_in_flight > 0 or worker.syncs.in_lanes > 0;
    }

    fn loop(worker: *Worker) void {
        const state = worker.state;
        while (true) {
            const worked = worker.round();
            const now = os.monotonicNs();
            const stopping = @atomicLoad(bool, &state.stopping, .acquire);
            const tick_ns: u64 = if (stopping) sleep.ns_max_stopping else sleep.ns_max;
            if (now -% worker.last_tick_ns >= tick_ns) worker.tick(now);
            if (worked) continue;
            if (stopping) {
                for (worker.served()) |each| {
                    each.consumer.leave_open = true;
                    if (!each.orphans.isEmpty()) each.consumer.leave_held = true; // the next daemon finds them there
                }
                const drained = worker.isDrained();
                if (drained or now >= @atomicLoad(u64, &state.stop_deadline_ns, .acquire)) {
                    @atomicStore(bool, &state.drained, drained, .release);
                    @atomicStore(u32, &state.worker_ended, 1, .release);
                    os.futexWake(&state.worker_ended, 1);
                    return;
                }
            }
            sleep.untilCalled(worker);
        }
    }

    /// One batch. Returns whether there was anything to do.
    fn round(worker: *Worker) bool {
        for (worker.served()) |each| {
            if (each.memory.isLost() and !each.lost) worker.loseRing(each);
            if (@atomicLoad(bool, &each.deserted, .acquire)) each.consumer.leave_open = true;
        }
        var worked = worker.takeRequests();
        worker.batch_full = false;
        if (worker.deferring_files > 0) worker.takeDeferred();
        if (worker.collect()) {
            worked = true;
            steps.reached(.collected);
        }
        for (worker.served()) |each| {
            if (!each.recovery_over and (each.lost or each.consumer.isBehindCommitted(each.recovery_head))) worker.endRecovery(each);
        }
        if (worker.serveRequests()) worked = true;
        worker.releases.begin(worker);
        if (worker.active_count > 0) worker.publishCredits();
        if (worker.commit()) worked = true;
        worker.releases.finish(worker);
        if (worker.reap()) worked = true;
        worker.publish();
        for (worker.active[0..worker.active_count]) |route| admission.update(worker.state, worker.served(), route, route.buffer != null or worker.mayFill(route));
        if (worked) steps.reached(.published);
        for (worker.served()) |each| {
            if (!each.lost and each.consumer.release()) each.has_more_room = true;
        }
        if (worked) steps.reached(.released);
        worker.publishCredits();
        // Not before: who is woken looks at free slots and at his credit, and sleeps on if he finds too little of either.
        for (worker.served()) |each| {
            if (each.has_more_room and !each.lost) each.consumer.wakeProducers();
            each.has_more_room = false;
        }
        if (worker.syncs.begin(worker)) worked = true;
        if (worker.state.stub) |stub| worked = stub.afterRound(worker) or worked;
        worker.retireIdleRoutes();
        return worked;
    }

    // ---- collect ------------------------------------------------------------------------------------

    /// In turns, so that nobody who floods a ring of his own keeps the others waiting.
    fn collect(worker: *Worker) bool {
        var taken: u32 = 0;
        var progress = true;
        while (progress and taken < ring.slot_count and worker.hasRoom()) {
            progress = false;
            for (0..worker.ring_count) |turn| {
                const each = worker.rings[(worker.first_ring + turn) % worker.ring_count];
                const items = worker.collectFrom(each);
                taken += items;
                if (items > 0) progress = true;
            }
        }
        if (worker.ring_count > 1) worker.first_ring = (worker.first_ring + 1) % worker.ring_count;
        if (worker.gated) worker.openGates();
        return taken > 0;
    }

    fn collectFrom(worker: *Worker, from: *ServedRing) u32 {
        const items_max: u32 = if (worker.ring_count == 1) ring.slot_count else turn_items_max;
        if (from.lost) return 0;
        var taken: u32 = 0;
        while (taken < items_max and worker.hasRoom()) : (taken += 1) {
            if (from.recovery_over) {
                if (from.consumer.nextPassed()) |item| {
                    worker.handle(from, &item, true);
                    continue;
                }
            }
            if (from.consumer.next()) |item| {
                worker.handle(from, &item, false);
                continue;
            }
            // What the daemon before had resolved keeps its place: an append that it had passed and that was
            // committed later comes behind, not before.
            if (from.recovery_over) break;
            const item = from.consumer.nextPassed() orelse break;
            worker.handle(from, &item, true);
        }
        while (from.consumer.takeDamage()) |damage| worker.reportDamage(from, damage);
        return taken;
    }

    /// An fsync covers what stood in other rings when it was called: its position waits until the worker has looked
    /// at all of them up to there. false: nobody else has the file open.
    fn gate(worker: *Worker, from: *ServedRing, file: *const File, route: *const Route, position: u64) bool {
        var others = false;
        for (file.handle_list.items) |entry| {
            if (entry.ring == from) continue;
            others = true;
            _ = lookUpToHead(entry.ring);
        }
        if (!others) return false;
        const line = &from.lines[route.index];
        line.gate_position = @min(line.gate_position, position);
        worker.gated = true;
        return true;
    }

    fn openGates(worker: *Worker) void {
        for (worker.served()) |each| {
            if (!each.lost and !each.consumer.hasSeen(each.consumer.required_scan)) return;
        }
        worker.gated = false;
        for (worker.served()) |each| {
            for (worker.active[0..worker.active_count]) |route| each.lines[route.index].gate_position = Line.no_gate;
        }
    }

    /// Room for whatever operation comes next: a free buffer for a route that has none, and in each one that is
    /// being filled, space for the longest record.
    pub fn hasRoom(worker: *const Worker) bool {
        return worker.buffers.free != null and !worker.batch_full;
    }

    fn handle(worker: *Worker, from: *ServedRing, item: *const Item, was_passed: bool) void {
        const header = &item.header;
        const file = worker.fileOf(from, item) orelse return;
        const route = worker.state.route(file.route);
        const line = &from.lines[route.index];
        if (file.native == .native and item.position >= from.recovery_head) {
            return worker.reject(from, item, "its file was made native before");
        }
        if (worker.state.null_sink) {
            const payload = from.view.payload(item.position, ring.spanForLength(header.length_bytes));
            if (checksum.crc32c(0, payload[0..header.length_bytes]) != header.payload_checksum) return worker.reject(from, item, "its payload checksum is wrong");
            from.consumer.consume(item, @intCast(route.index));
            worker.state.counters.add(.records_total, 1);
            return worker.touch(from, route);
        }
        const taken: Taken = if (wasLogged(from, item.position)) .taken else switch (@as(ring.Operation, @enumFromInt(header.operation))) {
            .write, .append, .truncate, .allocate => worker.take(from, item, file, route),
            .barrier => blk: {
                worker.state.counters.add(.barriers_total, 1);
                if (header.argument != ring.barrier_look) route.sync_wanted = true;
                // Of one that was passed, another one follows.
                if (worker.state.stub) |stub| if (!was_passed) stub.synced(from, item, file);
                if (worker.gate(from, file, route, item.position)) {
                    line.shared_barrier_position = @min(line.shared_barrier_position, item.position);
                } else if (route.buffer == null) line.barriers_before_record = true;
                break :blk .taken;
            },
            else => {
                worker.reject(from, item, "its operation is unknown");
                return;
            },
        };
        const route_index: u16 = @intCast(route.index);
        switch (taken) {
            .taken => {},
            .rejected => return,
            .deferred => {
                from.consumer.consumeHeld(item, route_index);
                line.deferred_position = @min(line.deferred_position, item.position);
                return worker.touch(from, route);
            },
        }
        // Held until the buffer is durable and applied: a passed claim, since its owner waits for the release, and the
        // positions, which passed it long ago, say nothing of it (so it is made durable at once in every mode); and
        // whatever stands in a group that the log has refused, since the ring is then the only place that has it.
        if (was_passed) route.sync_wanted = true;
        if (was_passed or route.failed_errno != 0) {
            from.consumer.consumeHeld(item, route_index);
            if (route.buffer) |buffer| buffer.settleLater(from, item.position) else from.consumer.settle(item.position);
        } else from.consumer.consume(item, route_index);
        worker.touch(from, route);
    }

    fn touch(worker: *Worker, from: *ServedRing, route: *Route) void {
        from.lines[route.index].touched = true;
        if (from.sole_candidate != route.index) {
            from.sole_disturbed = from.sole_candidate != positions.no_sole_route;
            from.sole_candidate = route.index;
        }
        worker.activate(route);
    }

    /// The file that an operation names, if its sender may name it.
    fn fileOf(worker: *Worker, from: *ServedRing, item: *const Item) ?*File {
        const header = &item.header;
        if (item.position < from.recovery_head) {
            // Accepted by an earlier daemon, whose handle table is gone: the log knows the file by its id.
            if (worker.recovered.files.get(header.file_id)) |file| return file;
            if (from.aliases.get(header.file_id)) |file| return file;
            if (wasLogged(from, item.position) or worker.recovered.removed.contains(header.file_id)) {
                from.consumer.consume(item, consumer_module.no_route);
                return null;
            }
            // A ring of the clients' own may come late, when its files are let go of. They have them open still.
            if (from.memory.lock_fd < 0 and !worker.recovered.lost.contains(header.file_id) and header.operation != @intFromEnum(ring.Operation.barrier)) {
                from.consumer.consumeHeld(item, consumer_module.no_route);
                from.orphans.append(from, item);
                return null;
            }
            from.consumer.consume(item, consumer_module.no_route);
            worker.setAside(from, item);
            return null;
        }
        if (header.handle >= positions.handles_max) {
            worker.reject(from, item, "its handle is out of range");
            return null;
        }
        const entry = from.handles[header.handle];
        const file = entry.file orelse {
            worker.reject(from, item, "its handle is not registered");
            return null;
        };
        if (entry.session != from.sessionOfRow(item.owner) or file.file_id != header.file_id) {
            worker.reject(from, item, "its handle belongs to another session or file");
            return null;
        }
        return file;
    }

    /// Accepted by an earlier daemon for a file that is not there any more, or that no log names: kept, never
    /// thrown away.
    fn setAside(worker: *Worker, from: *ServedRing, item: *const Item) void {
        const header = &item.header;
        if (header.operation == @intFromEnum(ring.Operation.barrier)) return;
        const span = ring.spanForLength(header.length_bytes);
        const payload = from.view.payload(item.position, span)[0..header.length_bytes];
        quarantine.add(worker.state, null, std.mem.asBytes(header), payload, .{
            .file_id = header.file_id,
            .path = "?",
            .reason = "no log names its file, or the file is not there any more",
        });
    }

    /// A client registers a file again that its ring may hold something for, by the name that an earlier daemon gave it:
    /// that is done before anything new.
    fn takeOrphans(worker: *Worker, from: *ServedRing, former_file_id: u64, file: *File) void {
        if (former_file_id == 0 or former_file_id == file.file_id) return;
        // What is open there may be committed later. (Without memory it goes to the quarantine then.)
        if (from.aliases.count() < ring.slot_count) from.aliases.put(worker.state.allocator, former_file_id, file) catch {};
        if (from.orphans.isEmpty()) return;
        const had_none = file.deferred.isEmpty();
        from.orphans.move(former_file_id, &file.deferred);
        if (had_none and !file.deferred.isEmpty()) worker.deferring_files += 1;
        worker.noteDeferred(worker.state.route(file.route));
    }

    fn wasLogged(from: *const ServedRing, position: u64) bool {
        return position < from.recovery_head and from.logged_positions.contains(position);
    }

    const Taken = enum {
        taken,
        /// The sender has been told.
        rejected,
        /// It is in its file's list: see `takeDeferred`.
        deferred,
    };

    /// Copies one operation into its route's group.
    fn take(worker: *Worker, from: *ServedRing, item: *const Item, file: *File, route: *Route) Taken {
        const must_wait = !file.deferred.isEmpty() or !worker.mayFill(route);
        const taken: Taken = if (must_wait) .deferred else worker.takeNow(from, item, file, route);
        if (taken == .deferred) worker.deferItem(from, item, file);
        return taken;
    }

    /// A group that its log has refused may have no room for more; and targets that do not keep up may not take all log
    /// buffers with them.
    pub fn mayFill(worker: *const Worker, route: *const Route) bool {
        if (route.buffer) |buffer| return buffer.hasRoom();
        return route.applying_count < buffers_module.share_min or worker.buffers.free_count > buffers_module.buffer_count / 2;
    }

    fn takeNow(worker: *Worker, from: *ServedRing, item: *const Item, file: *File, route: *Route) Taken {
        const header = &item.header;
        const operation: ring.Operation = @enumFromInt(header.operation);
        // What an earlier daemon accepted is logged in any case: its sender cannot be told any more.
        // A truncate is what may make room: its sender asks what came of it (see `isCutTried`).
        if (file.failed_errno != 0 and item.position >= from.recovery_head and operation != .truncate) {
            reportError(.{ .ring = from, .index = header.handle }, file.failed_errno);
            return .taken; // answered: with the error
        }
        const file_offset_max = std.math.maxInt(i64);
        var offset = header.offset;
        var length: u64 = header.length_bytes;
        if (operation == .allocate) length = header.time_ns;
        if (!file.end_known) lookAtEnd(file);
        if (operation == .append) offset = worker.resolveEnd(from, item, file, route) orelse return .deferred;
        if (operation == .allocate and header.argument & ~falloc_keep_size != 0) {
            worker.reject(from, item, "its fallocate mode is not one that can be logged");
            return .rejected;
        }
        if (offset > file_offset_max or length > file_offset_max - offset) {
            worker.reject(from, item, "its offset and length are beyond any file");
            return .rejected;
        }
        const buffer = worker.bufferOf(route, .{ .ring = from, .position = item.position }) orelse {
            worker.reject(from, item, "no buffer was free"); // hasRoom() was asked before
            return .rejected;
        };
        const payload_length: u32 = switch (operation) {
            .write, .append => header.length_bytes,
            .truncate => 0,
            .allocate => 8,
            else => unreachable,
        };
        var allocate_length: [8]u8 = undefined;
        std.mem.writeInt(u64, &allocate_length, length, .little);
        const slot = buffer.group.append(.{
            .kind = switch (operation) {
                .write, .append => .write,
                .truncate => .truncate,
                .allocate => .allocate,
                else => unreachable,
            },
            .ring_uuid = from.uuid,
            .position = item.position,
            .file_id = file.file_id,
            .offset = offset,
            .length_bytes = payload_length,
            .payload_checksum = if (operation == .allocate) checksum.crc32c(0, &allocate_length) else header.payload_checksum,
            .argument = header.argument,
            .time_ns = header.time_ns,
        }) orelse {
            worker.reject(from, item, "its group was full");
            return .rejected;
        };
        if (operation == .allocate) {
            @memcpy(slot.payload, &allocate_length);
        } else {
            // The only copy that the daemon makes; the checksum is computed over it, not over shared memory.
            const span = ring.spanForLength(header.length_bytes);
            @memcpy(slot.payload, from.view.payload(item.position, span)[0..payload_length]);
            if (checksum.crc32c(0, slot.payload) != header.payload_checksum) {
                buffer.group.cancelLast();
                worker.reject(from, item, "its payload checksum is wrong");
                return .rejected;
            }
        }
        switch (operation) {
            .append => {
                const shared: *volatile u64 = &from.view.slotHeader(item.position).resolved_offset;
                shared.* = ring.Resolved.encode(item.position, offset);
                file.end = @max(file.end, offset + length); // offsets of a recovery may come out of order
                if (item.position >= from.recovery_head) {
                    @atomicStore(u64, &from.publisher.handle(header.handle).append_end, file.end, .release);
                }
            },
            .write => file.end = @max(file.end, offset + length),
            .truncate => file.end = offset,
            .allocate => if (header.argument & falloc_keep_size == 0) {
                file.end = @max(file.end, offset + length);
            },
            else => unreachable,
        }
        buffer.add(file, .{
            .kind = switch (operation) {
                .write => .write,
                // What an earlier daemon has resolved, it may have written there already.
                .append => if (item.position < from.recovery_head) .write else .append,
                .truncate => .truncate,
                .allocate => .allocate,
                else => unreachable,
            },
            .argument = header.argument,
            .offset = offset,
            .length = length,
            .payload = slot.payload,
            .lsn = slot.lsn,
            .next = 0,
        });
        file.last_lsn = slot.lsn;
        if (operation == .truncate and file.failed_errno != 0) {
            file.cut_lsn = slot.lsn;
            file.rewrite_at_ns = 0;
        }
        route.data_lsn = slot.lsn;
        // An allocate has its length there, and what an earlier daemon accepted was not waiting for this one.
        if (operation != .allocate and item.position >= from.recovery_head) buffer.oldest_ns = @min(buffer.oldest_ns, header.time_ns);
        if (!buffer.hasRoom()) worker.batch_full = true;
        if (file.unsynced_lsn == 0) file.unsynced_lsn = slot.lsn;
        if (worker.state.stub) |stub| stub.taken(from, item, file, offset, length, slot.lsn, slot.payload);
        worker.state.counters.add(.records_total, 1);
        worker.state.counters.add(.record_bytes_total, payload_length);
        return .taken;
    }

    /// Where an append goes. Looks at the file whenever nothing of ours is on its way to it, so that what
    /// others appended is not overwritten, and what others cut off is noticed. null: deferred.
    fn resolveEnd(worker: *Worker, from: *ServedRing, item: *const Item, file: *File, route: *Route) ?u64 {
        if (item.position < from.recovery_head) {
            if (ring.Resolved.decode(item.position, item.header.resolved_offset)) |offset| return offset;
        }
        if (file.queue.isEmpty() and file.chain_buffer == null and file.failed_errno == 0) {
            const expected = file.end;
            lookAtEnd(file);
            if (file.end < expected) {
                worker.state.counters.add(.foreign_truncates_total, 1);
                worker.state.events.post(.warning, "foreign_truncate", .{ .path = file.identity.pathText(), .expected_bytes = expected, .found_bytes = file.end });
                // What the log held before must never be replayed over it. What is in the file must be durable before
                // the fence is, and that may take long.
                if (!file.queue_synced) {
                    file.awaits_fence = true;
                    return null;
                }
                _ = worker.logFence(file, route, .{ .ring = from, .position = item.position });
            }
        }
        return file.end;
    }

    fn deferItem(worker: *Worker, from: *ServedRing, item: *const Item, file: *File) void {
        if (file.deferred.isEmpty()) worker.deferring_files += 1;
        file.deferred.append(from, item);
    }

    /// Operations that had to wait: until their route has a log buffer to fill; or, whose file was cut short by somebody
    /// else, until all before them is applied and synced, so that the fence can be logged, and they behind it.
    fn takeDeferred(worker: *Worker) void {
        for (worker.known_files.items) |file| {
            if (file.deferred.isEmpty()) continue;
            const route = worker.state.route(file.route);
            if (!worker.mayFill(route)) continue;
            if (file.awaits_fence and file.failed_errno == 0) {
                if (!worker.isSynced(file)) continue;
                if (!worker.hasRoom()) return;
                lookAtEnd(file);
                const first = file.deferred.first.?;
                if (!worker.logFence(file, route, .{ .ring = first.ring, .position = first.item.position })) return;
            }
            file.awaits_fence = false;
            // The slots that they hold are given back when they are durable.
            route.sync_wanted = true;
            // The slots that all of them hold are fewer than a buffer has records, but their bytes may be more.
            while (worker.hasRoom()) {
                const waiting = file.deferred.first orelse break;
                const line = &waiting.ring.lines[route.index];
                const position = waiting.item.position;
                switch (worker.takeNow(waiting.ring, &waiting.item, file, route)) {
                    .taken => {
                        line.first_record_position = @min(line.first_record_position, position);
                        if (route.buffer) |buffer| buffer.settleLater(waiting.ring, position) else waiting.ring.consumer.settle(position);
                    },
                    .rejected => waiting.ring.consumer.settle(position),
                    .deferred => break, // for a fence, now
                }
                _ = file.deferred.takeFirst();
                worker.touch(waiting.ring, route);
            }
            if (file.deferred.isEmpty()) worker.deferring_files -= 1;
            worker.noteDeferred(route);
        }
    }

    /// How far the route's positions may be published.
    fn noteDeferred(worker: *Worker, route: *const Route) void {
        for (worker.served()) |each| each.lines[route.index].deferred_position = Line.no_gate;
        for (worker.known_files.items) |file| {
            if (file.route != route.index) continue;
            var next = file.deferred.first;
            while (next) |waiting| : (next = waiting.next) {
                const line = &waiting.ring.lines[route.index];
                line.deferred_position = @min(line.deferred_position, waiting.item.position);
            }
        }
    }

    /// All that was taken for the file is in it, and durable there. Sees to it that it will be, where it is not. Not for
    /// a file that fails.
    fn isSynced(worker: *Worker, file: *File) bool {
        assert(file.failed_errno == 0);
        if (file.chain_buffer != null) return false;
        if (file.queue_synced) return true;
        // One sync at a time: the kernel tells one of them of a lost page, and the other that all is well.
        if (file.syncing or file.queue_syncing) return false;
        Applier.enqueueSync(file);
        worker.applier.start(file);
        worker.applier.flush();
        return false;
    }

    fn lookAtEnd(file: *File) void {
        // The statx of an open descriptor does not fail; if it did, what is known would stay.
        file.end = os.sizeOf(file.fd) orelse file.end;
        file.end_known = true;
    }

    const falloc_keep_size: u32 = 1;

    fn logFence(worker: *Worker, file: *File, route: *Route, place: ?Place) bool {
        const lsn = worker.logOwn(file, route, .fence, &.{}, place) orelse return false;
        file.last_lsn = lsn;
        file.fence_lsn = lsn;
        // What the file had before it is durable there, so the fence must be durable too, in every flush mode.
        route.sync_wanted = true;
        worker.state.counters.add(.fences_total, 1);
        return true;
    }

    pub fn logIdentity(worker: *Worker, file: *File, route: *Route) bool {
        const length = file.identity.payloadBytes();
        var payload: [@sizeOf(wal.FileIdentity) + 4096]u8 = undefined;
        file.identity.writePayload(payload[0..length]);
        file.identity_lsn = worker.logOwn(file, route, .identity, payload[0..length], null) orelse return false;
        return true;
    }

    /// A record of the daemon's own about a file. Its LSN; null: no room.
    pub fn logOwn(worker: *Worker, file: *const File, route: *Route, kind: wal.Kind, payload: []const u8, place: ?Place) ?u64 {
        const buffer = worker.bufferOf(route, place) orelse return null;
        const slot = buffer.group.append(.{
            .kind = kind,
            .ring_uuid = @splat(0),
            .position = 0,
            .file_id = file.file_id,
            .offset = 0,
            .length_bytes = @intCast(payload.len),
            .payload_checksum = checksum.crc32c(0, payload),
            .argument = 0,
            .time_ns = os.monotonicNs(),
        }) orelse return null;
        @memcpy(slot.payload, payload);
        if (!buffer.hasRoom()) worker.batch_full = true;
        return slot.lsn;
    }

    pub const Place = struct { ring: *const ServedRing, position: u64 };

    /// `place`: of the operation that is being taken, which is seen but not in the buffer yet.
    fn bufferOf(worker: *Worker, route: *Route, place: ?Place) ?*Buffer {
        if (route.buffer) |buffer| return buffer;
        const buffer = worker.buffers.take() orelse return null;
        buffer.route = route.index;
        buffer.group.begin(route.log);
        route.buffer = buffer;
        // All that was collected before has no record in it: see commit.
        for (worker.served()) |each| each.lines[route.index].first_record_position = each.consumer.scan;
        if (place) |taken| taken.ring.lines[route.index].first_record_position = taken.position;
        worker.activate(route);
        return buffer;
    }

    pub fn activate(worker: *Worker, route: *Route) void {
        if (route.active) return;
        route.active = true;
        worker.active[worker.active_count] = route;
        worker.active_count += 1;
    }

    fn retireIdleRoutes(worker: *Worker) void {
        var i: u32 = 0;
        while (i < worker.active_count) {
            const route = worker.active[i];
            if (!worker.isIdle(route)) {
                i += 1;
                continue;
            }
            route.active = false;
            worker.active_count -= 1;
            worker.active[i] = worker.active[worker.active_count];
        }
    }

    fn isIdle(worker: *const Worker, route: *const Route) bool {
        if (route.buffer != null or route.applying_first != null or route.sync.in_lane or route.log.hasUnsynced()) return false;
        if (route.admission != .open) return false;
        for (worker.served()) |each| {
            if (each.lines[route.index].touched or each.consumer.held_slots[route.index] != 0) return false;
        }
        return true;
    }

    fn loseRing(worker: *Worker, gone: *ServedRing) void {
        const request = worker.state.allocator.create(Request) catch return; // in the next round
        request.* = .{ .kind = .ring_lost, .session = 0, .ring = gone };
        gone.lost = true;
        worker.state.answer(request);
    }

    /// All that the daemon before us left in the ring is taken over.
    fn endRecovery(worker: *Worker, over: *ServedRing) void {
        over.recovery_over = true;
        if (over.recovery_head > over.consumer.tail) worker.state.counters.add(.ring_slots_recovered_total, over.recovery_head - over.consumer.tail);
        over.logged_positions.clearAndFree(worker.state.allocator);
        worker.touchAll(over);
        if (!worker.recoveryIsOver()) return;
        for (worker.known_files.items) |file| worker.releases.replayed(file);
    }

    /// Every route's waiters look again: who waits for an operation that named no route is among them.
    fn touchAll(worker: *Worker, in: *ServedRing) void {
        for (0..worker.state.routeCount()) |index| {
            in.lines[index].touched = true;
            worker.activate(worker.state.route(@intCast(index)));
        }
    }

    fn reject(worker: *Worker, from: *ServedRing, item: *const Item, reason: []const u8) void {
        worker.state.counters.add(.records_rejected_total, 1);
        from.consumer.reject(item.position, item.owner, reason);
        worker.reportDamage(from, from.consumer.takeDamage().?);
    }

    /// Who owns what was damaged must learn of it: its operations would look done.
    fn reportDamage(worker: *Worker, in: *ServedRing, damage: consumer_module.Damage) void {
        const session = in.sessionOfRow(damage.owner);
        worker.state.events.post(.@"error", "slot_damaged", .{ .position = damage.position, .owner = damage.owner, .session = session, .reason = damage.reason });
        worker.touchAll(in);
        if (session == 0) return;
        for (worker.known_files.items) |file| {
            for (file.handle_list.items) |entry| {
                if (entry.session() == session) reportError(entry, @intFromEnum(linux.E.IO));
            }
        }
    }

    fn reportError(entry: HandleRef, errno: i32) void {
        if (entry.index >= positions.handles_max) return;
        const state = entry.state();
        @atomicStore(i32, &state.error_errno, errno, .release);
        _ = @atomicRmw(u32, &state.error_sequence, .Add, 1, .release);
    }

    pub fn reportFileError(file: *File, errno: i32) void {
        for (file.handle_list.items) |entry| reportError(entry, errno);
    }

    // ---- commit and apply ---------------------------------------------------------------------------

    fn commit(worker: *Worker) bool {
        var any = false;
        for (worker.active[0..worker.active_count]) |route| {
            const buffer = route.buffer orelse continue;
            // Barriers that stand before the batch's first record have nothing left to wait for.
            if (route.applying_first == null and route.failed_errno == 0 and !route.log.hasUnsynced()) {
                for (worker.served()) |each| {
                    const line = &each.lines[route.index];
                    if (!line.barriers_before_record) continue;
                    const position = @min(line.first_record_position, line.shared_barrier_position, line.limit());
                    publishPositions(each, route, position, position, position);
                }
            }
            if (buffer.buildRuns()) any = true;
            for (buffer.newFiles()) |file| worker.applier.start(file);
        }
        worker.applier.flush();
        if (any) steps.reached(.applying);
        for (worker.active[0..worker.active_count]) |route| {
            const buffer = route.buffer orelse continue;
            // A log that has failed is tried again from time to time, with the same group: that is the probe.
            if (route.failed_errno != 0 and os.monotonicNs() - route.failed_at_ns < retry_interval_ns) continue;
            if (worker.gathers(route, buffer)) continue;
            any = true;
            worker.commitRoute(route, buffer);
        }
        if (any) steps.reached(.committed);
        return any;
    }

    /// A sync is under way, and the group can wait for it, to be committed behind it in one durable write.
    fn gathers(worker: *const Worker, route: *const Route, buffer: *const Buffer) bool {
        if (!route.log.isSyncing() or route.flushMode() != .each_group) return false;
        return buffer.hasRoom() and !route.checkpoint.waits and !worker.isPressed(route);
    }

    /// The route's operations wait for space in a ring, or soon will.
    fn isPressed(worker: *const Worker, route: *const Route) bool {
        for (worker.served()) |each| {
            const is_sole = each.publisher.header().sole_route == route.index;
            const credit: u32 = ring.slot_count / 4 * @as(u32, if (is_sole) 3 else 1);
            if (each.consumer.held_slots[route.index] >= credit / 2) return true;
        }
        return false;
    }

    pub fn commitRoute(worker: *Worker, route: *Route, buffer: *Buffer) void {
        const state = worker.state;
        if (buffer.group.isEmpty()) {
            // All that it had was refused.
            route.buffer = null;
            worker.settle(buffer);
            return worker.buffers.give(buffer);
        }
        const bytes = buffer.group.commitBytes();
        const began_ns = os.monotonicNs();
        const asked = route.flushMode() == .each_group or route.sync_wanted or worker.isAwaited(route);
        worker.logGroup(route, buffer, asked and !worker.isPressed(route)) catch |err| {
            const errno = log_module.errnoOf(err);
            worker.logFailed(route, buffer, errno, @errorName(err));
            return worker.answerCommitted(route.index, errno);
        };
        route.buffer = null;
        buffer.last_lsn = buffer.group.lastLsn();
        for (worker.served()) |each| {
            const line = &each.lines[route.index];
            if (line.touched) buffer.setEnd(each, @min(each.consumer.scan, line.limit()));
        }
        buffer.logged = true;
        if (route.failed_errno != 0) worker.logRecovered(route);
        route.bytes_since_checkpoint += bytes;
        state.counters.add(.groups_total, 1);
        state.counters.add(.group_bytes_total, bytes);
        const ended_ns = os.monotonicNs();
        state.counters.add(.commit_ns_total, ended_ns - began_ns);
        route.oldest_undurable_ns = @min(route.oldest_undurable_ns, buffer.oldest_ns);
        if (!route.log.hasUnsynced()) {
            syncs_module.becameDurable(worker, route, ended_ns);
            worker.answerCommitted(route.index, 0);
        } else if (route.unsynced_since_ns == 0) route.unsynced_since_ns = began_ns;
        if (route.applying_last) |last| last.next = buffer else route.applying_first = buffer;
        route.applying_last = buffer;
        route.applying_count += 1;
        buffer.next = null;
        if (route.log.needsPreparation()) state.wakeMaintenance();
    }

    /// Into the log: durably, or else in memory too, until a sync.
    fn logGroup(worker: *Worker, route: *Route, buffer: *Buffer, at_once: bool) log_module.CommitError!void {
        const log = route.log;
        const bytes = buffer.group.commitBytes();
        const fits = bytes <= tails_module.tail_bytes;
        // One durable write is faster than a write and a sync.
        if (!log.hasUnsynced() and (at_once or !fits)) return log.commit(&buffer.group);
        if (fits and !log.hasTail()) {
            if (syncs_module.takeTail(worker)) |memory| log.lendTail(memory);
        }
        if (bytes <= log.tailRoom()) return log.write(&buffer.group);
        try log.sync();
        syncs_module.becameDurable(worker, route, os.monotonicNs());
        return log.commit(&buffer.group);
    }

    pub fn isAwaited(worker: *const Worker, route: *const Route) bool {
        var awaiting = worker.awaiting_commit;
        while (awaiting) |request| : (awaiting = request.next) {
            if (request.routeIndex() == route.index) return true;
        }
        return false;
    }

    pub fn isGated(worker: *const Worker, route: *const Route) bool {
        if (!worker.gated and worker.deferring_files == 0) return false;
        for (worker.served()) |each| {
            if (each.lines[route.index].limit() != Line.no_gate) return true;
        }
        return false;
    }

    /// To the files whose last record is in the log and not durable. (What a group holds that is not in the log is its
    /// buffer's to report.)
    pub fn reportUndurable(worker: *Worker, route: *const Route, errno: i32, next_lsn: u64) void {
        for (worker.known_files.items) |file| {
            if (file.route != route.index or file.last_lsn >= next_lsn) continue;
            if (file.last_lsn > route.log.durableLsn()) reportFileError(file, errno);
        }
    }

    /// The slots of a buffer that had to be held may be released.
    fn settle(worker: *Worker, buffer: *Buffer) void {
        _ = worker;
        for (buffer.settle[0..buffer.settle_count]) |held| held.ring.consumer.settle(held.position);
        buffer.settle_count = 0;
    }

    fn logFailed(worker: *Worker, route: *Route, buffer: *Buffer, errno: i32, name: []const u8) void {
        const state = worker.state;
        state.counters.add(.log_failures_total, 1);
        if (route.failed_errno == 0) {
            // Not one of its records is in the log: the ring keeps them all, also those that were not held so far.
            var records = buffer.group.records();
            while (records.next()) |slot| {
                const from = worker.ringOf(slot.header.ring_uuid) orelse continue; // the daemon's own
                if (from.consumer.hold(slot.header.position)) buffer.settleLater(from, slot.header.position);
            }
            worker.reportUndurable(route, errno, buffer.group.first_lsn);
        }
        if (route.failed_errno == 0) worker.postLogFailed(route, errno, name);
        // Once, however often it is tried.
        for (buffer.files[buffer.reported_count..buffer.file_count]) |file| reportFileError(file, errno);
        buffer.reported_count = buffer.file_count;
        worker.setFailed(route, errno);
    }

    pub fn postLogFailed(worker: *Worker, route: *const Route, errno: i32, name: []const u8) void {
        worker.state.events.post(.@"error", "log_failed", .{ .route = route.name, .errno = errno, .@"error" = name, .errno_name = Failure.nameOf(errno) });
    }

    pub fn setFailed(worker: *Worker, route: *Route, errno: i32) void {
        route.failed_errno = errno;
        route.failed_at_ns = os.monotonicNs();
        worker.publishFailure(route, errno);
    }

    fn publishFailure(worker: *Worker, route: *const Route, errno: i32) void {
        for (worker.served()) |each| {
            @atomicStore(i32, &each.publisher.route(route.index).failure_errno, errno, .release);
            each.publisher.wakeAll(route.index);
        }
    }

    fn ringOf(worker: *const Worker, uuid: [16]u8) ?*ServedRing {
        for (worker.served()) |each| {
            if (std.mem.eql(u8, &each.uuid, &uuid)) return each;
        }
        return null;
    }

    pub fn logRecovered(worker: *Worker, route: *Route) void {
        route.failed_errno = 0;
        worker.publishFailure(route, 0);
        worker.state.events.post(.info, "log_recovered", .{ .route = route.name });
    }

    fn reap(worker: *Worker) bool {
        var any = false;
        switch (worker.applier.engine) {
            .lanes => |*lanes| while (lanes.take()) |result| {
                worker.applier.completed(result.item, result.value);
                any = true;
            },
            .io_uring => |uring| {
                // Completions appear only when asked for.
                if (worker.applier.in_flight > 0) uring.submit();
                while (uring.take()) |completion| {
                    if (worker.sleeper.takes(completion.user_data)) continue;
                    worker.applier.completed(@ptrFromInt(completion.user_data), completion.res);
                    any = true;
                }
            },
        }
        while (worker.long_lanes.take()) |result| {
            worker.long_in_flight -= 1;
            worker.errandDone(result.item, -result.value);
            any = true;
        }
        if (worker.syncs.take(worker)) any = true;
        if (worker.applier.starved) {
            worker.applier.starved = false;
            for (worker.known_files.items) |file| worker.applier.start(file);
        }
        worker.applier.flush();
        return any;
    }

    fn runApplied(context: *anyopaque, run_done: *applier_module.Run) void {
        const worker: *Worker = @ptrCast(@alignCast(context));
        worker.state.counters.add(.applied_bytes_total, run_done.length);
    }

    /// Who else appends to the file, or cuts it, does not wait for the log: it is written natively from here on, and what
    /// the log says of it, the places above all, is not replayed.
    fn appendStrayed(context: *anyopaque, file: *File, meant: u64, offset: u64, written: u64) void {
        const worker: *Worker = @ptrCast(@alignCast(context));
        // Those behind it in the queue stray as well.
        file.end = @max(offset + written, file.end - meant + offset);
        for (file.handle_list.items) |entry| {
            const end = &entry.state().append_end;
            if (end.* > meant) @atomicStore(u64, end, end.* - meant + offset, .release);
        }
        worker.state.counters.add(.foreign_appends_total, 1);
        if (file.stray_fence or file.native == .native) return;
        const request = worker.state.allocator.create(Request) catch return; // with the next one
        request.* = .{ .kind = .fence_stray, .session = 0, .file = file };
        file.stray_fence = true;
        var end = &worker.pending;
        while (end.*) |queued| end = &queued.next;
        end.* = request;
        worker.state.events.post(.warning, "foreign_append", .{ .path = file.identity.pathText(), .expected_bytes = meant, .found_bytes = offset });
    }

    fn fileRefused(context: *anyopaque, file: *File, errno: i32) void {
        const worker: *Worker = @ptrCast(@alignCast(context));
        worker.state.counters.add(.apply_failures_total, 1);
        worker.state.events.post(.@"error", "target_refused", .{ .path = file.identity.pathText(), .errno = errno, .errno_name = Failure.nameOf(errno) });
        worker.failFile(file, errno);
    }

    fn queueSynced(context: *anyopaque, file: *File, errno: i32) void {
        const worker: *Worker = @ptrCast(@alignCast(context));
        if (errno != 0) worker.syncFailed(file, errno);
    }

    /// What the sync of a target lost cannot be known: none of what no sync has covered counts as written.
    pub fn syncFailed(worker: *Worker, file: *File, errno: i32) void {
        const route = worker.state.route(file.route);
        worker.state.counters.add(.target_sync_failures_total, 1);
        worker.state.events.post(.@"error", "target_sync_failed", .{ .route = route.name, .path = file.identity.pathText(), .errno = errno, .errno_name = Failure.nameOf(errno) });
        file.pages_suspect = true;
        // With nothing unsynced there is nothing to be written again, only to be synced.
        Applier.giveUp(file, if (file.unsynced_lsn != 0) file.unsynced_lsn else route.log.nextLsn());
        if (file.failed_errno == 0) worker.failFile(file, errno);
    }

    fn failFile(worker: *Worker, file: *File, errno: i32) void {
        assert(file.failed_errno == 0 and file.rewrite_lsn != 0);
        file.failed_errno = errno;
        worker.failed_files += 1;
        worker.state.route(file.route).failed_files += 1;
        file.rewrite_pause_ns = retry_interval_ns;
        file.rewrite_at_ns = os.monotonicNs() + retry_interval_ns;
        for (file.handle_list.items) |entry| {
            @atomicStore(i32, &entry.state().failed_errno, errno, .release);
            reportError(entry, errno);
        }
    }

    /// Writes a file from the log, if that can be done now.
    fn rewriteFile(worker: *Worker, file: *File, now: u64) void {
        if (file.rewriting or file.syncing or file.queue.inFlight() or now < file.rewrite_at_ns) return;
        const route = worker.state.route(file.route);
        const durable_lsn = file.log.durableLsn();
        // All that was taken for it must be there, and no more of it be on its way to its queue.
        if (file.chain_buffer != null or file.last_lsn > durable_lsn) {
            if (route.unsynced_since_ns != 0) route.sync_wanted = true;
            return;
        }
        assert(file.queue.isEmpty());
        file.errand = .rewrite;
        file.rewrite_to_lsn = durable_lsn;
        if (!worker.giveErrand(file)) return;
        file.rewriting = true;
    }

    /// What a truncate that was taken of a target that refuses comes to is known once the file has been written again
    /// with it. Sees to it that it is.
    fn isCutTried(worker: *Worker, file: *File) bool {
        if (file.cut_lsn == 0) return true;
        if (!file.rewriting) {
            if (file.cut_lsn <= file.rewrite_to_lsn) return true;
            worker.rewriteFile(file, os.monotonicNs());
        }
        return false;
    }

    pub fn giveErrand(worker: *Worker, file: *File) bool {
        if (!FileLanes.give(file.long_lane.?, file)) return false;
        worker.long_in_flight += 1;
        worker.long_lanes.wakeAll();
        return true;
    }

    fn errandDone(worker: *Worker, file: *File, errno: i32) void {
        const route = worker.state.route(file.route);
        switch (file.errand) {
            .sync => {
                assert(file.syncing);
                file.syncing = false;
                if (file.name_synced) file.naming.forgetFormer(worker.state.allocator);
                if (errno != 0) {
                    // From where this one began; what came since counts no more than that.
                    if (file.syncing_lsn != 0) file.unsynced_lsn = file.syncing_lsn;
                    worker.syncFailed(file, errno);
                }
                file.syncing_lsn = 0;
                route.checkpoint.syncs -= 1;
                checkpoints.writeCursor(worker, route);
            },
            .release => {
                if (file.name_synced) file.naming.forgetFormer(worker.state.allocator);
                worker.releases.synced(worker, file, errno);
            },
            .rewrite => {
                assert(file.rewriting);
                file.rewriting = false;
                if (errno != 0 and file.handle_list.items.len == 0 and os.linksOf(file.fd) == 0) {
                    // Nobody has it open, and nobody can open it any more.
                    file.unsynced_lsn = 0;
                    worker.state.events.post(.info, "target_removed", .{ .path = file.identity.pathText(), .errno = errno });
                    return worker.endFailure(file);
                }
                if (errno != 0) {
                    file.rewrite_pause_ns = @min(2 * file.rewrite_pause_ns, rewrite_pause_ns_max);
                    file.rewrite_at_ns = os.monotonicNs() + file.rewrite_pause_ns;
                    if (errno == @intFromEnum(linux.E.BUSY) and !file.pages_held) {
                        file.pages_held = true;
                        worker.state.events.post(.warning, "target_pages_held", .{ .path = file.identity.pathText() });
                    }
                    return;
                }
                // The next checkpoint syncs it once more, and moves on.
                if (file.unsynced_lsn == 0 and file.last_lsn >= file.rewrite_lsn) file.unsynced_lsn = file.rewrite_lsn;
                if (file.last_lsn > file.rewrite_to_lsn) {
                    // What an earlier daemon had accepted was taken for it meanwhile.
                    file.rewrite_lsn = file.rewrite_to_lsn + 1;
                    return;
                }
                worker.state.events.post(.info, "target_recovered", .{ .path = file.identity.pathText() });
                worker.endFailure(file);
            },
        }
    }

    fn endFailure(worker: *Worker, file: *File) void {
        file.rewrite_lsn = 0;
        file.cut_lsn = 0;
        file.failed_errno = 0;
        file.pages_suspect = false;
        file.pages_held = false;
        worker.failed_files -= 1;
        worker.state.route(file.route).failed_files -= 1;
        for (file.handle_list.items) |entry| @atomicStore(i32, &entry.state().failed_errno, 0, .release);
    }

    // ---- publish ------------------------------------------------------------------------------------

    /// A fresh positions memory knows nothing yet: all that is released is durable and applied.
    fn publishStart(worker: *Worker, fresh: *ServedRing) void {
        for (0..positions.routes_max) |index| {
            const line = fresh.publisher.route(@intCast(index));
            line.logged = fresh.consumer.tail;
            line.durable = fresh.consumer.tail;
            line.applied = fresh.consumer.tail;
            const errno = if (index < worker.state.routeCount()) worker.state.route(@intCast(index)).failed_errno else 0;
            line.failure_errno = errno;
            line.durable_when_asked = if (index < worker.state.routeCount()) isDurableWhenAsked(worker.state.route(@intCast(index))) else 0;
            line.closed = if (index < worker.state.routeCount()) @intFromBool(worker.state.route(@intCast(index)).admission != .open) else 0;
        }
        @atomicStore(u64, &fresh.publisher.header().scanned, fresh.consumer.scan, .release);
    }

    fn isDurableWhenAsked(route: *const Route) u32 {
        return @intFromBool(route.flushMode() != .each_group);
    }

    fn publish(worker: *Worker) void {
        for (worker.active[0..worker.active_count]) |route| {
            // What is not in the log is not passed by any position.
            const committed = route.buffer == null;
            for (worker.served()) |each| {
                const line = &each.lines[route.index];
                line.barriers_before_record = false;
                line.shared_barrier_position = Line.no_gate;
                if (!committed or !line.touched) continue;
                line.seen_position = @max(line.seen_position, @min(each.consumer.scan, line.limit()));
                line.touched = line.limit() != Line.no_gate;
                // Nothing of it in the group, but what stood before may be on its way to the files.
                if (route.applying_last) |last| last.setEnd(each, line.seen_position);
            }
            while (route.applying_first) |buffer| {
                if (!buffer.isApplied()) break;
                if (buffer.settle_count > 0 and buffer.last_lsn > route.log.durableLsn()) break;
                route.applying_first = buffer.next;
                route.applying_count -= 1;
                if (buffer.next == null) route.applying_last = null;
                for (worker.served()) |each| {
                    const line = &each.lines[route.index];
                    if (buffer.ends_set.isSet(each.index)) line.applied_position = @max(line.applied_position, buffer.end_positions[each.index]);
                }
                worker.settle(buffer);
                route.applied_lsn = @max(route.applied_lsn, buffer.last_lsn);
                worker.buffers.give(buffer);
            }
            for (worker.served()) |each| {
                const line = &each.lines[route.index];
                if (route.applying_first == null and committed) line.applied_position = @max(line.applied_position, line.seen_position);
                const logged = @max(line.seen_position, line.applied_position);
                publishPositions(each, route, logged, if (route.log.hasUnsynced()) 0 else logged, line.applied_position);
                const shared = each.publisher.route(route.index);
                const asked = isDurableWhenAsked(route);
                if (shared.durable_when_asked != asked) @atomicStore(u32, &shared.durable_when_asked, asked, .release);
            }
        }
    }

    /// Positions only ever move forward.
    pub fn publishPositions(in: *ServedRing, route: *const Route, logged: u64, durable: u64, applied: u64) void {
        const line = in.publisher.route(route.index);
        in.publisher.publish(route.index, @max(line.logged, logged), @max(line.durable, durable), @max(line.applied, applied));
    }

    /// The producers' credits: how far we have looked, what each route holds, and whether one of them has the
    /// ring to itself (nothing came for another within the last while).
    fn publishCredits(worker: *Worker) void {
        for (worker.served()) |each| {
            const header = each.publisher.header();
            if (each.sole_disturbed) {
                each.sole_disturbed = false;
                each.sole_since_ns = os.monotonicNs();
            }
            var sole = if (each.consumer.holding_routes > 1) positions.no_sole_route else each.sole_candidate;
            if (each.sole_since_ns != 0) {
                if (os.monotonicNs() - each.sole_since_ns < sleep.ns_max) sole = positions.no_sole_route else each.sole_since_ns = 0;
            }
            if (header.sole_route != sole) {
                @atomicStore(u32, &header.sole_route, sole, .release);
                each.has_more_room = true;
            }
            for (worker.active[0..worker.active_count]) |route| {
                const line = each.publisher.route(route.index);
                const held = each.consumer.held_slots[route.index];
                if (line.held_slots != held) @atomicStore(u32, &line.held_slots, held, .release);
            }
            if (header.scanned != each.consumer.scan) {
                @atomicStore(u64, &header.scanned, each.consumer.scan, .release);
                each.has_more_room = true;
            }
        }
    }

    // ---- requests -----------------------------------------------------------------------------------

    fn takeRequests(worker: *Worker) bool {
        var request = worker.state.to_worker.takeAll() orelse return false;
        while (true) {
            const next = request.next;
            // Whatever its sender put into its ring before comes first.
            if (request.ring) |its| request.barrier = lookUpToHead(its);
            request.next = null;
            var end = &worker.pending;
            while (end.*) |queued| end = &queued.next;
            end.* = request;
            request = next orelse break;
        }
        return true;
    }

    /// The head, up to which the worker will look even past an open claim that has nothing behind it.
    fn lookUpToHead(at: *ServedRing) u64 {
        const head = at.headPosition();
        at.consumer.required_scan = @max(at.consumer.required_scan, head);
        return head;
    }

    fn serveRequests(worker: *Worker) bool {
        var any = false;
        var link = &worker.pending;
        while (link.*) |request| {
            switch (if (worker.isFirstOfItsHandle(request)) worker.serve(request) else .later) {
                .later => link = &request.next,
                .answered => {
                    link.* = request.next;
                    const asked_about = if (request.kind != .forget_file) request.file else null;
                    worker.state.answer(request);
                    // Behind the answer: the control thread knows by then whether somebody has it open.
                    if (asked_about) |file| worker.offerFile(file);
                    any = true;
                },
                .after_commit => {
                    link.* = request.next;
                    request.next = worker.awaiting_commit;
                    request.commit_lsn = worker.lastTakenLsn(worker.state.route(request.routeIndex()));
                    worker.awaiting_commit = request;
                    any = true;
                },
            }
        }
        return any;
    }

    /// Whether another request that is not answered is about that ring, which must be there until then.
    fn isAskedAboutRing(worker: *const Worker, its: *const ServedRing, asking: *const Request) bool {
        for ([_]?*Request{ worker.pending, worker.awaiting_commit }) |list| {
            var each = list;
            while (each) |request| : (each = request.next) if (request != asking and request.ring == its) return true;
        }
        return false;
    }

    /// Requests about one handle are served in order: a session may close while its handle is still to be opened.
    fn isFirstOfItsHandle(worker: *Worker, request: *const Request) bool {
        if (request.file == null) return true;
        var earlier = worker.pending;
        while (earlier) |other| : (earlier = other.next) {
            if (other == request) return true;
            if (other.file == request.file and other.ring == request.ring and other.handle == request.handle) return false;
        }
        unreachable; // it is in the list
    }

    pub const Served = enum { later, answered, after_commit };

    fn serve(worker: *Worker, request: *Request) Served {
        const state = worker.state;
        switch (request.kind) {
            .activate => {
                const file = request.file.?;
                const route = state.route(file.route);
                if (file.native == .undecided) return .later;
                if (!worker.knowFile(file)) {
                    request.errno = @intFromEnum(linux.E.NOMEM);
                    return .answered;
                }
                if (request.former_file_id != 0) {
                    const its = request.ring.?;
                    if (its.consumer.scan < its.recovery_head and !its.lost) return .later;
                    worker.takeOrphans(its, request.former_file_id, file);
                    if (!file.deferred.isEmpty()) request.begun = true;
                }
                // Who is alone with a file counts on it that nothing of anybody else's is on its way there, be it what an
                // earlier daemon has accepted.
                if ((file.handle_list.items.len == 0 or request.begun) and !worker.isAtRest(file)) return .later;
                if (request.begun and file.failed_errno == 0 and file.last_lsn > route.log.durableLsn()) {
                    route.sync_wanted = true;
                    return .later;
                }
                if (request.refusal != null and file.native != .native) {
                    if (file.handle_list.items.len > 0 or file.last_lsn > file.fence_lsn) {
                        request.errno = @intFromEnum(linux.E.STALE); // somebody else has had it since it was fenced
                        return .answered;
                    }
                    file.native = .native;
                }
                if (!worker.openHandle(file, request)) {
                    request.errno = @intFromEnum(linux.E.NOMEM);
                    return .answered;
                }
                // An identity at or below a checkpoint will not be found by the next replay, and one below a release counts
                // for nothing.
                if (file.identity_lsn > @max(route.checkpoint.lsn, file.release.lsn)) {
                    // Another session's registration may have it in a group that is still to be committed.
                    return if (file.identity_lsn <= route.log.durableLsn()) .answered else .after_commit;
                }
                if (!worker.hasRoom()) return .later;
                return if (worker.logIdentity(file, route)) .after_commit else .later;
            },
            .release => {
                const file = request.file.?;
                if (!request.ring.?.isBehindOf(request.barrier, request.session)) return .later;
                if (file.chain_buffer != null or !file.deferred.isEmpty()) return .later;
                if (!file.queue.isEmpty() and file.failed_errno == 0) return .later;
                worker.closeHandle(file, .{ .ring = request.ring.?, .index = request.handle });
                // What the target refused is tried again: it stays open for writing, in case it cannot be opened again.
                request.errno = file.failed_errno;
                return .answered;
            },
            .fence, .fence_stray => return worker.serveFence(request),
            .fence_unfit => {
                if (!request.begun and request.file.?.native == .native) return .answered;
                if (worker.knowFile(request.file.?)) return worker.serveFence(request);
                request.errno = @intFromEnum(linux.E.NOMEM);
                return .answered;
            },
            .drain => {
                const file = request.file.?;
                if (!request.begun) {
                    request.begun = true;
                    // It is offered when this is answered, and only what is known can be let go of.
                    _ = worker.knowFile(file);
                    request.barriers = @splat(0);
                    for (worker.served()) |each| request.barriers[each.index] = lookUpToHead(each);
                }
                const lsn = request.lsn orelse lsn: {
                    for (worker.served()) |each| {
                        // Of a claim that was passed the write has not returned yet. A ring that came since holds nothing
                        // that had returned when this was asked: it is looked at in any case.
                        if (!each.consumer.hasSeen(request.barriers[each.index])) return .later;
                    }
                    if (!file.deferred.isEmpty()) return .later;
                    request.lsn = file.last_lsn;
                    break :lsn file.last_lsn;
                };
                if (!worker.isCutTried(file)) return .later;
                if (file.failed_errno != 0 and !file.queue.isEmpty()) {
                    request.errno = file.failed_errno;
                    return .answered;
                }
                return if (file.isAppliedTo(lsn)) .answered else .later;
            },
            .moved, .moved_below, .removed => return names.serve(worker, request),
            .forget_session => {
                const its = request.ring.?;
                if (!its.isBehindOf(request.barrier, request.session)) return .later;
                for (&its.row_sessions, 0..) |*session, row| {
                    if (@atomicLoad(u64, session, .acquire) != request.session) continue;
                    // A thread may outlive its session (it closed the socket): its row waits for its end.
                    if (ring_memory.ownerOf(its.view.producerRow(@intCast(row))) == .living) {
                        @atomicStore(u64, session, served_ring.orphaned, .release);
                        its.rows_to_free += 1;
                        continue;
                    }
                    freeRow(its, @intCast(row));
                }
                return .answered;
            },
            .serve_ring => {
                worker.serveRing(request.ring.?);
                request.ring.?.publisher.beginServing();
                return .answered;
            },
            .leave_ring => {
                const its = request.ring.?;
                its.consumer.leave_open = true;
                while (its.orphans.takeFirst()) |waiting| {
                    if (!its.lost) worker.setAside(its, &waiting.item);
                    its.consumer.settle(waiting.item.position);
                }
                if (!worker.isDrainedOf(its) or worker.isAskedAboutRing(its, request)) return .later;
                for (worker.served(), 0..) |each, i| {
                    if (each != its) continue;
                    worker.ring_count -= 1;
                    worker.rings[i] = worker.rings[worker.ring_count];
                    break;
                }
                worker.first_ring = 0;
                its.publisher.endServing();
                // What io_uring waits for there ends now.
                os.futexWake(&its.view.header().doorbell, 1);
                return .answered;
            },
            .offer_file, .ring_lost => unreachable, // go the other way
            .forget_file => {
                const file = request.file.?;
                // Somebody may have opened it again, or written to it since.
                worker.offers_open -= 1;
                file.offered = false;
                if (request.errno != 0 or !file.known or !isForgettable(file, state.route(file.route))) {
                    request.errno = @intFromEnum(linux.E.BUSY);
                    return .answered;
                }
                for (worker.known_files.items, 0..) |known, i| {
                    if (known != file) continue;
                    _ = worker.known_files.swapRemove(i);
                    break;
                }
                _ = worker.recovered.files.remove(file.file_id);
                for (worker.served()) |each| each.forgetAliases(file);
                worker.releases.remove(file);
                file.known = false;
                return .answered;
            },
        }
    }

    /// Nothing of the file is on its way that was accepted before this daemon's life, or by who has left.
    fn isAtRest(worker: *const Worker, file: *const File) bool {
        for (worker.served()) |each| {
            if (each.consumer.scan < each.recovery_head) return false;
        }
        return file.failed_errno != 0 or (file.deferred.isEmpty() and file.isAppliedTo(file.last_lsn));
    }

    pub fn serveFence(worker: *Worker, request: *Request) Served {
        const file = request.file.?;
        if (!request.begun) worker.beginFence(file, request);
        for (file.handle_list.items) |entry| {
            if (!entry.ring.isBehindOf(request.barriers[entry.ring.index], entry.session())) return .later;
        }
        if (file.failed_errno != 0) return decideFence(file, request, file.failed_errno);
        if (!file.deferred.isEmpty() or !worker.isSynced(file) or !worker.hasRoom()) return .later;
        return if (worker.logFence(file, worker.state.route(file.route), null)) .after_commit else .later;
    }

    /// No process may send anything for the file from here on. Whoever has claimed a slot without seeing that
    /// stands below the head as it is read then (see HandleState.native).
    fn beginFence(worker: *Worker, file: *File, request: *Request) void {
        request.begun = true;
        file.fences_open += 1;
        if (file.native == .routed) publishNative(file, .undecided);
        for (worker.served()) |each| request.barriers[each.index] = lookUpToHead(each);
    }

    fn decideFence(file: *File, request: *Request, errno: i32) Served {
        request.errno = errno;
        request.native = errno == 0;
        file.fences_open -= 1;
        if (request.kind == .fence_stray) file.stray_fence = false;
        if (errno == 0) {
            // All that had it open may have closed it meanwhile.
            publishNative(file, if (file.handle_list.items.len > 0) .native else .routed);
        } else if (file.native == .undecided and file.fences_open == 0) {
            publishNative(file, .routed);
        }
        return .answered;
    }

    /// What was to be done behind it will not be.
    pub fn abandonFence(file: *File, request: *Request) void {
        _ = decideFence(file, request, @intFromEnum(linux.E.NOMEM));
        request.begun = false;
    }

    fn publishNative(file: *File, native: positions.Native) void {
        file.native = native;
        for (file.handle_list.items) |entry| @atomicStore(positions.Native, &entry.state().native, native, .seq_cst);
    }

    fn freeRow(its: *ServedRing, row: u32) void {
        ring_memory.initMutex(its.view.producerRow(row));
        @atomicStore(u64, &its.row_sessions[row], 0, .release);
    }

    fn knowFile(worker: *Worker, file: *File) bool {
        if (file.known) return true;
        switch (worker.applier.engine) {
            .lanes => |*lanes| file.lane = lanes.laneOf(file.identity.blob.device) orelse return false,
            .io_uring => {},
        }
        file.long_lane = worker.long_lanes.laneOf(file.identity.blob.device) orelse return false;
        worker.known_files.append(worker.state.allocator, file) catch return false;
        file.known = true;
        return true;
    }

    fn knowReplayed(worker: *Worker, route: *Route) void {
        while (route.replayed.getLastOrNull()) |file| {
            if (!worker.knowFile(file)) return; // looked at again with the next tick
            _ = route.replayed.pop();
            if (file.failed_errno != 0) {
                worker.failed_files += 1;
                route.failed_files += 1;
            }
            if (worker.recoveryIsOver()) worker.releases.replayed(file);
        }
    }

    /// Nothing in the rings is for a file that has no handle.
    fn recoveryIsOver(worker: *const Worker) bool {
        for (worker.served()) |each| if (!each.recovery_over) return false;
        return true;
    }

    fn openHandle(worker: *Worker, file: *File, request: *Request) bool {
        const opened = HandleRef{ .ring = request.ring.?, .index = request.handle };
        file.handle_list.append(worker.state.allocator, opened) catch return false;
        worker.releases.remove(file);
        const state = opened.state();
        state.* = .{ .error_sequence = state.error_sequence, .error_errno = 0, .append_end = 0, .native = file.native, .reserved = 0, .file_handles = 0, .failed_errno = file.failed_errno };
        request.native = file.native == .native;
        opened.ring.handles[opened.index] = .{ .file = file, .session = request.session };
        publishSharers(file);
        return true;
    }

    fn closeHandle(worker: *Worker, file: *File, closed: HandleRef) void {
        closed.ring.handles[closed.index] = .{};
        for (file.handle_list.items, 0..) |listed, i| {
            if (listed.ring != closed.ring or listed.index != closed.index) continue;
            _ = file.handle_list.swapRemove(i);
            break;
        }
        if (file.handle_list.items.len == 0) {
            if (file.fences_open == 0) file.native = .routed;
            worker.releases.closed(file);
        }
        publishSharers(file);
    }

    fn publishSharers(file: *File) void {
        const sharers: u32 = @intCast(file.handle_list.items.len);
        for (file.handle_list.items) |entry| @atomicStore(u32, &entry.state().file_handles, sharers, .seq_cst);
    }

    /// Of a record in the log, or in the group that goes there next.
    fn lastTakenLsn(worker: *const Worker, route: *const Route) u64 {
        _ = worker;
        if (route.buffer) |buffer| if (!buffer.group.isEmpty()) return buffer.group.lastLsn();
        return route.log.nextLsn() - 1;
    }

    /// Those whose records are durable; or, with an errno, all.
    pub fn answerCommitted(worker: *Worker, route_index: u32, errno: i32) void {
        const durable_lsn = worker.state.route(route_index).log.durableLsn();
        var link = &worker.awaiting_commit;
        while (link.*) |request| {
            if (request.routeIndex() != route_index or (errno == 0 and request.commit_lsn > durable_lsn)) {
                link = &request.next;
                continue;
            }
            link.* = request.next;
            request.errno = errno;
            switch (request.kind) {
                .fence, .fence_stray, .fence_unfit => _ = decideFence(request.file.?, request, errno),
                .removed, .moved => if (request.begun) {
                    _ = decideFence(request.file.?, request, errno);
                },
                else => {},
            }
            if (errno != 0 and request.kind == .activate) {
                request.file.?.identity_lsn = 0; // not in the log after all
                worker.closeHandle(request.file.?, .{ .ring = request.ring.?, .index = request.handle });
            }
            const asked_about = request.file;
            worker.state.answer(request);
            // It may have been let go of but for this question.
            if (asked_about) |file| worker.offerFile(file);
        }
    }

    // ---- now and then -------------------------------------------------------------------------------

    fn tick(worker: *Worker, now: u64) void {
        worker.last_tick_ns = now;
        const state = worker.state;
        for (worker.served()) |each| {
            if (!each.lost and each.memory.isCutShort()) worker.loseRing(each);
            if (each.rows_to_free == 0) continue;
            for (&each.row_sessions, 0..) |*session, row| {
                if (session.* != served_ring.orphaned) continue;
                if (ring_memory.ownerOf(each.view.producerRow(@intCast(row))) == .living) continue;
                freeRow(each, @intCast(row));
                each.rows_to_free -= 1;
            }
        }
        if (worker.failed_files > 0) {
            for (worker.known_files.items) |file| {
                if (file.rewrite_lsn != 0) worker.rewriteFile(file, now);
            }
        }
        for (0..state.routeCount()) |index| {
            const route = state.route(@intCast(index));
            if (route.replayed.items.len > 0) worker.knowReplayed(route);
            admission.tick(state, route, now);
            checkpoints.tick(worker, route, now);
        }
    }

    /// Nobody has it open, and it is wholly below the checkpoint (so no checkpoint under way knows it either), or released.
    fn isForgettable(file: *const File, route: *const Route) bool {
        return file.handle_list.items.len == 0 and file.unsynced_lsn == 0 and !file.syncing and file.queue.isEmpty() and
            file.rewrite_lsn == 0 and file.fences_open == 0 and !file.stray_fence and file.deferred.isEmpty() and file.chain_buffer == null and
            (file.last_lsn <= route.checkpoint.last_lsn or release.isReleased(file));
    }

    /// Tells the control thread that it may let go of a file.
    pub fn offerFile(worker: *Worker, file: *File) void {
        if (file.offered or !isForgettable(file, worker.state.route(file.route))) return;
        const request = worker.state.allocator.create(Request) catch return; // it is offered again when it is next closed
        request.* = .{ .kind = .offer_file, .session = 0, .file = file };
        file.offered = true;
        worker.offers_open += 1;
        worker.state.answer(request);
    }

    fn isDrained(worker: *Worker) bool {
        if (worker.pending != null or worker.awaiting_commit != null) return false;
        for (worker.served()) |each| {
            if (!worker.isDrainedOf(each)) return false;
        }
        if (worker.isStuck() or worker.offers_open > 0) return false;
        for (0..worker.state.routeCount()) |index| {
            const route = worker.state.route(@intCast(index));
            if (route.buffer != null or route.applying_first != null or route.sync.in_lane or route.log.hasUnsynced()) return false;
            const job = @atomicLoad(@TypeOf(route.checkpoint.state), &route.checkpoint.state, .acquire);
            if (job != .idle) return false;
            // What a target or the log itself does not take stays in the log, for the next start.
            if (route.failed_files == 0 and !route.checkpoint.cursor_failed and route.data_lsn > route.checkpoint.last_lsn) return false;
        }
        return true;
    }

    /// Nothing of this ring is under way, or to be done.
    fn isDrainedOf(worker: *const Worker, of: *ServedRing) bool {
        if (!of.lost and (of.consumer.tail != of.consumer.scan or of.consumer.somethingToDo())) return false;
        for (0..worker.state.routeCount()) |index| {
            const route = worker.state.route(@intCast(index));
            if (route.buffer != null and of.lines[index].touched) return false;
            if (!of.lost and of.lines[index].deferred_position != Line.no_gate) return false;
            var buffer = route.applying_first;
            while (buffer) |each| : (buffer = each.next) {
                if (each.ends_set.isSet(of.index)) return false;
            }
        }
        return true;
    }
};
