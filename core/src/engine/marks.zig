//! Sets the mark of files, and takes it off (files.mark, files.unmark), off the control thread: a file system that hangs
//! holds up those who wait for a file there, and no other session. A thread per file system.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const files = @import("files.zig");

pub const threads_max = 64;

pub const Job = struct {
    kind: enum { mark, unmark },
    device: u64,
    /// The job's own.
    fd: i32,
    route: u32 = 0,
    log_uuid: [16]u8 = @splat(0),
    file_id: u64 = 0,
    sync: files.Sync = .done,
    /// Of what is to be marked.
    identity: files.Identity = undefined,
    /// Why that failed.
    failed: ?error{ NoAttribute, TargetFailed } = null,
    errno: i32 = 0,
    next: ?*Job = null,

    fn perform(job: *Job) void {
        switch (job.kind) {
            .mark => files.mark(job.fd, job.identity.pathText(), job.log_uuid, job.file_id, job.sync, &job.errno) catch |err| {
                job.failed = err;
            },
            .unmark => files.unmark(job.fd),
        }
    }
};

/// First in, first out.
const Jobs = struct {
    first: ?*Job = null,
    last: ?*Job = null,

    fn push(jobs: *Jobs, job: *Job) void {
        job.next = null;
        if (jobs.last) |last| last.next = job else jobs.first = job;
        jobs.last = job;
    }

    fn pop(jobs: *Jobs) ?*Job {
        const job = jobs.first orelse return null;
        jobs.first = job.next;
        if (job.next == null) jobs.last = null;
        return job;
    }
};

const Worker = struct {
    device: u64,
    marks: *Marks,
    thread: std.Thread = undefined,
    /// Under the marks' mutex.
    jobs: Jobs = .{},
    condition: std.Thread.Condition = .{},

    fn run(worker: *Worker) void {
        const marks = worker.marks;
        marks.mutex.lock();
        defer marks.mutex.unlock();
        while (true) {
            while (worker.jobs.pop()) |job| {
                marks.mutex.unlock();
                job.perform();
                marks.mutex.lock();
                marks.done.push(job);
                const one: u64 = 1;
                _ = linux.write(marks.eventfd, std.mem.asBytes(&one), 8);
            }
            if (marks.stopping) return;
            worker.condition.wait(&marks.mutex);
        }
    }
};

/// Control thread.
pub const Marks = struct {
    allocator: std.mem.Allocator,
    /// Rung when something is done.
    eventfd: i32,
    mutex: std.Thread.Mutex = .{},
    done: Jobs = .{},
    stopping: bool = false,
    workers: [threads_max]*Worker = undefined,
    count: u32 = 0,

    /// It comes back by `takeDone`.
    pub fn give(marks: *Marks, job: *Job) void {
        const worker = marks.workerOf(job.device) orelse {
            // Not one thread is to be had.
            job.perform();
            marks.mutex.lock();
            defer marks.mutex.unlock();
            marks.done.push(job);
            const one: u64 = 1;
            _ = linux.write(marks.eventfd, std.mem.asBytes(&one), 8);
            return;
        };
        marks.mutex.lock();
        defer marks.mutex.unlock();
        worker.jobs.push(job);
        worker.condition.signal();
    }

    pub fn takeDone(marks: *Marks) ?*Job {
        marks.mutex.lock();
        defer marks.mutex.unlock();
        return marks.done.pop();
    }

    fn workerOf(marks: *Marks, device: u64) ?*Worker {
        for (marks.workers[0..marks.count]) |worker| {
            if (worker.device == device) return worker;
        }
        if (marks.count == threads_max) return marks.workers[device % threads_max];
        const other = if (marks.count > 0) marks.workers[device % marks.count] else null;
        const worker = marks.allocator.create(Worker) catch return other;
        worker.* = .{ .device = device, .marks = marks };
        worker.thread = std.Thread.spawn(.{ .stack_size = 256 << 10 }, Worker.run, .{worker}) catch {
            marks.allocator.destroy(worker);
            return other;
        };
        marks.workers[marks.count] = worker;
        marks.count += 1;
        return worker;
    }

    /// Ends the threads. Only once nothing is with them: one that hangs in its file system cannot be joined.
    pub fn deinit(marks: *Marks) void {
        marks.mutex.lock();
        marks.stopping = true;
        for (marks.workers[0..marks.count]) |worker| worker.condition.signal();
        marks.mutex.unlock();
        for (marks.workers[0..marks.count]) |worker| {
            worker.thread.join();
            assert(worker.jobs.first == null);
            marks.allocator.destroy(worker);
        }
        marks.count = 0;
    }
};
