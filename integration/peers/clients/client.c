#include "client.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* More than the fastest disk of these machines lets one client do in a round. */
enum { SAMPLES_MAX = 1 << 18 };

const char payload[PAYLOAD_BYTES] = {[0 ... PAYLOAD_BYTES - 1] = 'e'};

struct client {
    pthread_t thread;
    unsigned number;
    uint64_t start_ns, until_ns;
    uint64_t *samples_ns;
    uint64_t samples;
};

noreturn void fail(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void *run(void *argument)
{
    struct client *client = argument;
    struct timespec start = {(time_t)(client->start_ns / 1000000000u), (long)(client->start_ns % 1000000000u)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &start, NULL);
    uint64_t began_ns = now_ns();
    for (client->samples = 0; began_ns < client->until_ns && client->samples < SAMPLES_MAX; client->samples++) {
        append_record(client->number);
        uint64_t ended_ns = now_ns();
        client->samples_ns[client->samples] = ended_ns - began_ns;
        began_ns = ended_ns;
    }
    return NULL;
}

int serve(void)
{
    static struct client clients[CLIENTS_MAX];
    unsigned count;
    unsigned long long start_ns, until_ns;
    char path[4096];

    puts("ready");
    fflush(stdout);
    while (scanf("%u %llu %llu %4095s", &count, &start_ns, &until_ns, path) == 4) {
        if (count > CLIENTS_MAX) fail("order", "more clients than this program has");
        for (unsigned i = 0; i < count; i++) {
            struct client *client = &clients[i];
            if (!client->samples_ns) client->samples_ns = malloc(SAMPLES_MAX * sizeof(uint64_t));
            if (!client->samples_ns) fail("samples", strerror(ENOMEM));
            client->number = i;
            client->start_ns = start_ns;
            client->until_ns = until_ns;
            int error = pthread_create(&client->thread, NULL, run, client);
            if (error) fail("pthread_create", strerror(error));
        }
        FILE *file = fopen(path, "wb");
        if (!file) fail(path, strerror(errno));
        uint64_t total = 0;
        for (unsigned i = 0; i < count; i++) {
            pthread_join(clients[i].thread, NULL);
            if (fwrite(clients[i].samples_ns, sizeof(uint64_t), clients[i].samples, file) != clients[i].samples)
                fail(path, strerror(errno));
            total += clients[i].samples;
        }
        if (fclose(file)) fail(path, strerror(errno));
        printf("%llu\n", (unsigned long long)total);
        fflush(stdout);
    }
    return 0;
}
