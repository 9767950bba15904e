/* A driver's NVML with the cards of -DCARDS and as many calls as hfms makes; compiled and loaded by test_cuda.py. */
#include <stddef.h>
#include <string.h>

typedef struct {
    const char *uuid, *name;
    unsigned long long total, free;
    unsigned cores, clock;
    int fault; /* what nvmlDeviceGetMemoryInfo answers */
} Card;

static Card cards[] = {CARDS};
static int open_count;

int opened(void) { return open_count; }

int nvmlInit_v2(void) { open_count++; return INIT; }
int nvmlShutdown(void) { open_count--; return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "GPU is lost"; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = DRIVER; return 0; }

static unsigned count(void) {
    unsigned n = 0;
    while (n < sizeof cards / sizeof *cards && strncmp(cards[n].uuid, "MIG-", 4)) n++;
    return n;
}

int nvmlDeviceGetCount_v2(unsigned *n) { *n = count(); return open_count > 0 ? 0 : 1; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index >= count()) return 2;
    *handle = &cards[index];
    return 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++)
        if (!strcmp(cards[i].uuid, uuid)) { *handle = &cards[i]; return 0; }
    return 6;
}

static int text(const char *from, char *to, unsigned size) {
    if (strlen(from) + 1 > size) return 7;
    strcpy(to, from);
    return 0;
}

int nvmlDeviceGetName(Card *card, char *name, unsigned size) { return text(card->name, name, size); }
int nvmlDeviceGetUUID(Card *card, char *uuid, unsigned size) { return text(card->uuid, uuid, size); }

int nvmlDeviceGetMemoryInfo(Card *card, unsigned long long memory[3]) {
    memory[0] = card->total;
    memory[1] = card->free;
    memory[2] = card->total - card->free;
    return card->fault;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetNumGpuCores(Card *card, unsigned *cores) { *cores = card->cores; return 0; }
#endif
int nvmlDeviceGetMaxClockInfo(Card *card, int type, unsigned *clock) { *clock = type == 1 ? card->clock : 0; return 0; }
