/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Virtual times. An account has one in each lane; it advances by work / weight. scheduler_choose()
 * compares it with the least one among the accounts that could use what is given away: for decoding
 * those that decode, for prompts all. Whoever leads by more than LEAD is passed over; within a step
 * each row counts at once, so that an account with many flows gives one now and one then and not
 * all together. Who joins either set is lifted to its least virtual time: time spent away, waiting
 * for memory, or in a prompt whose pace is bounded for the others' sake, is no claim to stop them
 * later. Flows within an account likewise; but where several accounts want rows, an account's
 * decoding waits for its own prompts as well, which would never be read if decoding took all that
 * the account can have. A task that is under way in the other lane is not there for this one: who
 * cannot be picked holds nobody back.
 *
 * Costs. Steps without prompts tell, for each number of decoding rows, what such a step takes. What
 * a step with prompts takes longer, per row of prompt, is learned for two situations apart, because
 * it depends on the chunk: small chunks beside somebody's decoding, and large ones. Chunks then
 * are what fits the time by that, and grow by steps only, so that a wrong guess costs little. A
 * number of decoding rows not measured lately is measured first, by a step without prompts. All of
 * it in each lane by itself.
 *
 * Everything a step does is linear in the tasks, but for sorting those it picks from.
 */

#include "engine/scheduler.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

#define DEFAULT_MAX_RUNNING 64
#define DEFAULT_WEIGHT 100
#define MOST_WEIGHT 10000
#define BATCH_PART 4 /* a batch task's weight is so much smaller */

#define LEAD 4.0          /* tokens, at default weight */
#define SHORT_ABSENCE 16  /* steps: from the end of a request to the next one's first token */
#define ABSENCE_CREDIT 32 /* tokens that may be caught up on after it */
#define ADMISSION 16.0    /* tokens that a request counts in the order of admission */

#define STEP_USEC 200000.0 /* with a prompt in it, where nobody waits */
#define BESIDE_FACTOR 2.5  /* of a step without, where somebody does */
#define FIRST_CHUNK 4      /* rows, while nothing is known */
#define PROMPT_COST 0.125  /* tokens, of a row: a guess for as long */
#define MEASURED 65        /* numbers of decoding rows told apart */
#define MEASURE_AGAIN 256  /* steps */
#define RATE_SLOTS 10
#define RATE_SLOT_USEC 1000000
#define USUAL_ANSWER 128 /* tokens, until some answer was seen */

/* Where and how far somebody is in the competition for rows; of an account or a flow. */
struct share {
    double time;                      /* virtual, in tokens at default weight */
    bool is_runnable, decodes;        /* as of this choice */
    bool was_runnable, decoded;       /* of the last one */
    bool is_interactive;              /* something runnable of it is more than batch */
    uint32_t n_decoding;              /* tasks */
    uint64_t runnable_at, decoded_at; /* step of the lane in which it last was */
    double least;                     /* an account's: virtual time of its flows */
};

struct flow {
    uint64_t id;
    struct share share[SCHEDULER_LANES];
    struct flow *next; /* account::flows */
    uint32_t n_tasks;
};

struct account {
    uint64_t id;
    bool is_idle; /* of its idle tasks; the others have another */
    uint32_t weight;
    bool is_weight_set;
    struct share share[SCHEDULER_LANES];
    struct account *next; /* scheduler::accounts */
    struct flow *flows;
    uint32_t n_tasks, n_running;

    /* Of this choice: the least virtual time of its flows that decode when all they have gets its
     * row; and, where other accounts want rows too, of those with a prompt. */
    double least_decoding;
};

struct scheduler_entry {
    struct scheduler_task *task;
    struct account *account;
    struct flow *flow;
    uint64_t age;
    size_t at; /* in scheduler::running or ::queued */
    bool is_running;
    uint64_t n_decoded;
    double key, flow_time; /* of the order being made */
    uint32_t position;     /* in the queue, 1: next */
    bool was_decoding;     /* when it was picked */
};

/* Extra time that rows of prompts take, in one of the two situations. */
struct prompt_cost {
    double usec, rows; /* sums that forget: their ratio is the cost of a row; rows 0: not known */
    double most_rows;  /* a little more than lately was tried */
};

enum situation {
    ALONE, /* nobody of another account waits for a token */
    BESIDE,
};

struct measured {
    double usec; /* of a step of so many decoding rows, 0: not known */
    uint64_t at; /* step */
};

/* Work of about a second. */
struct rate_slot {
    uint64_t usec, prompt_rows, decoded;
};

struct lane_state {
    uint32_t max_rows;
    uint64_t n_steps;
    double floor[2];                    /* least virtual time of the runnable; of idle ones */
    double most[2];                     /* the most ever */
    struct measured measured[MEASURED]; /* by decoding rows */
    struct prompt_cost cost[2];         /* by situation */
    enum situation situation;           /* of the step last chosen */
    double token_usec;                  /* from one token of a decoding task to the next */
    uint32_t n_decoding;                /* runnable in the step last chosen */
    struct rate_slot slots[RATE_SLOTS];
    unsigned slot;
    struct lane_statistics statistics; /* but for the rates */
};

struct scheduler {
    uint32_t max_rows, max_logits, max_running;
    unsigned even_lanes;
    bool is_loading;
    struct account *accounts;
    struct scheduler_entry **running, **queued; /* [n_allocated] */
    struct scheduler_entry **sorted;            /* [n_allocated], scratch */
    double *remaining; /* [n_allocated] usec until each that runs is done, in order */
    size_t n_running, n_queued, n_allocated;
    uint64_t n_added;
    bool is_ranked; /* positions and remaining are up to date */
    double answer;  /* tokens that requests generate */
    struct lane_state lanes[SCHEDULER_LANES];
};

/* A choice under way: what its steps share. */
struct choice {
    unsigned lane;
    bool is_idle;                 /* among idle tasks */
    double least, least_decoding; /* virtual time that others' are compared with */
};

/* ---- names ---- */

static const char *const class_names[] = {
    [CLASS_INTERACTIVE] = "interactive", [CLASS_BATCH] = "batch", [CLASS_IDLE] = "idle"};

const char *scheduler_class_name(enum scheduler_class c)
{
    return class_names[c];
}

int scheduler_class_parse(const char *name, enum scheduler_class *ret)
{
    for (size_t i = 0; i < ARRAY_SIZE(class_names); i++)
        if (strcmp(name, class_names[i]) == 0) {
            *ret = (enum scheduler_class)i;
            return 0;
        }
    return -EINVAL;
}

/* ---- sorting, in place and without memory of its own ---- */

typedef bool before_fn(const struct scheduler_entry *a, const struct scheduler_entry *b);

static void sift_down(struct scheduler_entry **e, size_t i, size_t n, before_fn *before)
{
    struct scheduler_entry *moving = e[i];

    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(e[child], e[child + 1]))
            child++;
        if (!before(moving, e[child]))
            break;
        e[i] = e[child];
    }
    e[i] = moving;
}

static void sort(struct scheduler_entry **e, size_t n, before_fn *before)
{
    for (size_t i = n / 2; i-- > 0;)
        sift_down(e, i, n, before);
    for (size_t end = n; end-- > 1;) {
        struct scheduler_entry *last = e[0];

        e[0] = e[end];
        e[end] = last;
        sift_down(e, 0, end, before);
    }
}

/* Accounts apart, in each by its flows' virtual time, flows apart. */
static bool before_in_account(const struct scheduler_entry *a, const struct scheduler_entry *b)
{
    if (a->account != b->account)
        return (uintptr_t)a->account < (uintptr_t)b->account;
    if (a->flow_time != b->flow_time)
        return a->flow_time < b->flow_time;
    return a->flow->id != b->flow->id ? a->flow->id < b->flow->id : a->age < b->age;
}

static bool before_by_key(const struct scheduler_entry *a, const struct scheduler_entry *b)
{
    if (a->key != b->key)
        return a->key < b->key;
    if (a->flow_time != b->flow_time)
        return a->flow_time < b->flow_time;
    return a->age < b->age;
}

static bool before_by_class_and_age(const struct scheduler_entry *a,
                                    const struct scheduler_entry *b)
{
    return a->task->class != b->task->class ? a->task->class < b->task->class : a->age < b->age;
}

static bool before_in_account_by_class(const struct scheduler_entry *a,
                                       const struct scheduler_entry *b)
{
    if (a->account != b->account)
        return (uintptr_t)a->account < (uintptr_t)b->account;
    return before_by_class_and_age(a, b);
}

static bool before_by_class_and_key(const struct scheduler_entry *a,
                                    const struct scheduler_entry *b)
{
    if (a->task->class != b->task->class)
        return a->task->class < b->task->class;
    return a->key != b->key ? a->key < b->key : a->age < b->age;
}

/* ---- who there is ---- */

int scheduler_new(struct scheduler **ret, const struct scheduler_options *options)
{
    struct scheduler *s = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    assert(options->max_rows > 0 && options->max_logits > 0);
    s->max_rows = options->max_rows;
    for (unsigned i = 0; i < SCHEDULER_LANES; i++)
        s->lanes[i].max_rows =
            options->lane_rows[i] ? MIN(options->lane_rows[i], s->max_rows) : s->max_rows;
    s->max_logits = options->max_logits;
    s->even_lanes = options->even_lanes;
    s->max_running = options->max_running ? options->max_running : DEFAULT_MAX_RUNNING;
    s->answer = USUAL_ANSWER;
    for (unsigned l = 0; l < SCHEDULER_LANES; l++)
        s->lanes[l].cost[ALONE].most_rows = s->lanes[l].cost[BESIDE].most_rows = FIRST_CHUNK;
    *ret = s;
    return 0;
}

static struct account *account_free(struct account *a)
{
    for (struct flow *f = a->flows, *next; f; f = next) {
        next = f->next;
        free(f);
    }
    free(a);
    return NULL;
}

struct scheduler *scheduler_free(struct scheduler *s)
{
    if (!s)
        return NULL;
    assert(s->n_running + s->n_queued == 0);
    for (struct account *a = s->accounts, *next; a; a = next) {
        next = a->next;
        account_free(a);
    }
    free(s->running);
    free(s->queued);
    free(s->sorted);
    free(s->remaining);
    free(s);
    return NULL;
}

void scheduler_freep(struct scheduler **s)
{
    scheduler_free(*s);
}

/* Coming back would lift it anyway, in every lane; or it was never there. */
static bool is_behind(const struct scheduler *s, const struct account *a)
{
    for (unsigned l = 0; l < SCHEDULER_LANES; l++)
        if (a->share[l].time > 0 &&
            a->share[l].time + ABSENCE_CREDIT > s->lanes[l].floor[a->is_idle])
            return false;
    return true;
}

static bool flow_is_behind(const struct account *a, const struct flow *f)
{
    for (unsigned l = 0; l < SCHEDULER_LANES; l++)
        if (f->share[l].time > a->share[l].least)
            return false;
    return true;
}

/* Whoever has no task is forgotten as soon as that makes no difference. */
static void forget(struct scheduler *s)
{
    for (struct account **at = &s->accounts, *a; (a = *at);) {
        for (struct flow **flow_at = &a->flows, *f; (f = *flow_at);) {
            if (f->n_tasks == 0 && (a->n_tasks == 0 || flow_is_behind(a, f))) {
                *flow_at = f->next;
                free(f);
            } else {
                flow_at = &f->next;
            }
        }
        if (a->n_tasks == 0 && !a->is_weight_set && is_behind(s, a)) {
            *at = a->next;
            account_free(a);
        } else {
            at = &a->next;
        }
    }
}

static struct account *find_account(struct scheduler *s, uint64_t id, bool is_idle)
{
    struct account *a = s->accounts;

    while (a && (a->id != id || a->is_idle != is_idle))
        a = a->next;
    return a;
}

static struct account *get_account(struct scheduler *s, uint64_t id, bool is_idle)
{
    struct account *a = find_account(s, id, is_idle), *other;

    if (a)
        return a;
    a = calloc(1, sizeof(*a));
    if (!a)
        return NULL;
    other = find_account(s, id, !is_idle);
    a->id = id;
    a->is_idle = is_idle;
    a->weight = other ? other->weight : DEFAULT_WEIGHT;
    a->next = s->accounts;
    s->accounts = a;
    return a;
}

static struct flow *get_flow(struct account *a, uint64_t id)
{
    struct flow *f = a->flows;

    while (f && f->id != id)
        f = f->next;
    if (f)
        return f;
    f = calloc(1, sizeof(*f));
    if (!f)
        return NULL;
    f->id = id;
    f->next = a->flows;
    a->flows = f;
    return f;
}

void scheduler_set_loading(struct scheduler *s, bool is_loading)
{
    s->is_loading = is_loading;
}

int scheduler_set_weight(struct scheduler *s, uint64_t account, uint32_t weight)
{
    struct account *a = get_account(s, account, false), *idle;

    if (!a)
        return -ENOMEM;
    weight = MIN(MAX(weight, 1u), (uint32_t)MOST_WEIGHT);
    a->weight = weight;
    a->is_weight_set = weight != DEFAULT_WEIGHT;
    idle = find_account(s, account, true);
    if (idle)
        idle->weight = weight;
    s->is_ranked = false;
    return 0;
}

/* ---- running and queued ---- */

static void list_add(struct scheduler_entry **list, size_t *n, struct scheduler_entry *e)
{
    e->at = *n;
    list[(*n)++] = e;
}

static void list_remove(struct scheduler_entry **list, size_t *n, struct scheduler_entry *e)
{
    list[e->at] = list[--*n];
    list[e->at]->at = e->at;
}

/* Room for one more task in every list. */
static int grow(struct scheduler *s)
{
    struct scheduler_entry ***const lists[] = {&s->running, &s->queued, &s->sorted};
    size_t n = s->n_running + s->n_queued + 1, allocated = MAX(n + n / 2, (size_t)64);
    double *remaining;

    if (n <= s->n_allocated)
        return 0;
    for (size_t i = 0; i < ARRAY_SIZE(lists); i++) {
        struct scheduler_entry **list = reallocarray(*lists[i], allocated, sizeof(*list));

        if (!list)
            return -ENOMEM;
        *lists[i] = list;
    }
    remaining = reallocarray(s->remaining, allocated, sizeof(*remaining));
    if (!remaining)
        return -ENOMEM;
    s->remaining = remaining;
    s->n_allocated = allocated;
    return 0;
}

int scheduler_add(struct scheduler *s, struct scheduler_task *task)
{
    CLEANUP(freep) struct scheduler_entry *e = NULL;
    int r;

    forget(s);
    r = grow(s);
    if (r < 0)
        return r;
    e = calloc(1, sizeof(*e));
    if (!e)
        return -ENOMEM;
    e->account = get_account(s, task->account, task->class == CLASS_IDLE);
    if (!e->account)
        return -ENOMEM;
    e->flow = get_flow(e->account, task->flow);
    if (!e->flow)
        return -ENOMEM;
    e->task = task;
    e->age = ++s->n_added;
    e->account->n_tasks++;
    e->flow->n_tasks++;
    s->is_ranked = false;
    task->entry = TAKE_PTR(e);
    list_add(s->queued, &s->n_queued, task->entry);
    return 0;
}

static void leave_list(struct scheduler *s, struct scheduler_entry *e)
{
    if (e->is_running) {
        list_remove(s->running, &s->n_running, e);
        e->account->n_running--;
    } else {
        list_remove(s->queued, &s->n_queued, e);
    }
    e->is_running = false;
    s->is_ranked = false;
}

void scheduler_remove(struct scheduler *s, struct scheduler_task *task)
{
    struct scheduler_entry *e = task->entry;

    assert(!task->is_under_way);
    leave_list(s, e);
    if (e->n_decoded > 0)
        s->answer += 0.1 * ((double)e->n_decoded - s->answer);
    e->account->n_tasks--;
    e->flow->n_tasks--;
    free(e);
    task->entry = NULL;
}

void scheduler_requeue(struct scheduler *s, struct scheduler_task *task)
{
    assert(!task->is_under_way);
    leave_list(s, task->entry);
    list_add(s->queued, &s->n_queued, task->entry);
}

/* Virtual time beyond the least of those that run, in all lanes together. */
static double lead_of(const struct scheduler *s, const struct account *a)
{
    double lead = 0;

    for (unsigned l = 0; l < SCHEDULER_LANES; l++)
        if (a->share[l].time > 0)
            lead += a->share[l].time - s->lanes[l].floor[a->is_idle];
    return lead;
}

struct scheduler_task *scheduler_victim(struct scheduler *s, const struct scheduler_task *task)
{
    const struct scheduler_entry *spared = NULL, *victim = NULL;
    bool is_queued = !task->entry->is_running;

    for (size_t i = 0; i < s->n_running; i++)
        if (!spared || before_by_class_and_age(s->running[i], spared))
            spared = s->running[i];
    for (size_t i = 0; i < s->n_running; i++) {
        const struct scheduler_entry *e = s->running[i];
        double lead;

        if ((is_queued ? e->task->class <= task->class : e == spared) || e->task->is_under_way)
            continue;
        if (!victim) {
            victim = e;
            continue;
        }
        lead = lead_of(s, e->account) - lead_of(s, victim->account);
        if (e->task->class != victim->task->class ? e->task->class > victim->task->class
            : lead != 0                           ? lead > 0
                                                  : e->age > victim->age)
            victim = e;
    }
    return victim ? victim->task : NULL;
}

/* ---- the queue ---- */

static double prompt_row_usec(const struct lane_state *l, enum situation situation)
{
    const struct prompt_cost *c = &l->cost[situation];

    if (c->rows > 0)
        return c->usec / c->rows;
    c = &l->cost[!situation];
    return c->rows > 0 ? c->usec / c->rows : 0;
}

/* The less of two costs, of which 0 is not known. */
static double known_least(double a, double b)
{
    return a > 0 && b > 0 ? MIN(a, b) : MAX(a, b);
}

/* What is usual where it is done best; 0: not known. */
static double usual_token_usec(const struct scheduler *s)
{
    double usec = 0;

    for (unsigned l = 0; l < SCHEDULER_LANES; l++)
        usec = known_least(usec, s->lanes[l].token_usec);
    return usec;
}

static double usual_row_usec(const struct scheduler *s)
{
    double usec = 0;

    for (unsigned l = 0; l < SCHEDULER_LANES; l++)
        usec = known_least(usec, prompt_row_usec(&s->lanes[l], ALONE));
    return usec;
}

/* Until a running task is done; a guess. */
static double remaining_usec(const struct scheduler *s, const struct scheduler_entry *e)
{
    const struct scheduler_task *t = e->task;
    double tokens = MAX(s->answer - (double)e->n_decoded, s->answer / 4);

    if (t->max_tokens > 0)
        tokens = MIN(tokens, (double)t->max_tokens);
    return tokens * usual_token_usec(s) + (t->n_pending > 1 ? t->n_pending * usual_row_usec(s) : 0);
}

/* Puts both lists in order and gives the queued their positions. */
static void rank(struct scheduler *s)
{
    const struct account *account = NULL;
    double in_advance = 0;

    if (s->is_ranked)
        return;
    sort(s->queued, s->n_queued, before_in_account_by_class);
    for (size_t i = 0; i < s->n_queued; i++) {
        struct scheduler_entry *e = s->queued[i];
        const struct account *a = e->account;

        if (a != account)
            in_advance = a->n_running;
        account = a;
        e->key = in_advance * ADMISSION * DEFAULT_WEIGHT / a->weight;
        for (unsigned l = 0; l < SCHEDULER_LANES; l++)
            e->key += MAX(a->share[l].time - s->lanes[l].floor[a->is_idle], 0.0);
        in_advance++;
    }
    sort(s->queued, s->n_queued, before_by_class_and_key);
    for (size_t i = 0; i < s->n_queued; i++) {
        s->queued[i]->at = i;
        s->queued[i]->position = (uint32_t)i + 1;
    }

    for (size_t i = 0; i < s->n_running; i++) {
        s->sorted[i] = s->running[i];
        s->sorted[i]->key = remaining_usec(s, s->running[i]);
        s->sorted[i]->flow_time = 0;
    }
    sort(s->sorted, s->n_running, before_by_key);
    for (size_t i = 0; i < s->n_running; i++)
        s->remaining[i] = s->sorted[i]->key;
    s->is_ranked = true;
}

struct scheduler_task *scheduler_next_queued(struct scheduler *s)
{
    rank(s);
    return s->n_queued > 0 ? s->queued[0]->task : NULL;
}

struct scheduler_task *scheduler_admit(struct scheduler *s, uint64_t kv_bytes_free)
{
    struct scheduler_entry *e;
    uint64_t needed;

    if (s->n_queued == 0 || s->n_running >= s->max_running)
        return NULL;
    rank(s);
    e = s->queued[0];
    needed = e->task->kv_bytes;
    for (size_t i = 0; i < s->n_running; i++)
        if (ckd_add(&needed, needed, s->running[i]->task->kv_bytes))
            return NULL;
    if (needed > kv_bytes_free && s->n_running > 0)
        return NULL;
    leave_list(s, e);
    list_add(s->running, &s->n_running, e);
    e->is_running = true;
    e->account->n_running++;
    return e->task;
}

uint32_t scheduler_position(struct scheduler *s, const struct scheduler_task *task,
                            uint64_t *ret_estimate_usec)
{
    double usec = 0, token = usual_token_usec(s);
    uint32_t before;

    *ret_estimate_usec = 0;
    if (task->entry->is_running)
        return 0;
    rank(s);
    before = task->entry->position - 1;
    if (s->n_running > 0 && token > 0) {
        usec = s->remaining[before % s->n_running];
        usec += (double)(before / s->n_running) * s->answer * token;
    }
    *ret_estimate_usec = (uint64_t)usec;
    return task->entry->position;
}

/* ---- the next step ---- */

/* The virtual times that who joins is measured by: of those that were there before. */
struct company {
    double least, least_decoding, most;
    bool goes_on, decodes_on;
};

static void note_company(struct company *c, const struct share *s)
{
    c->most = MAX(c->most, s->time);
    if (s->is_runnable && s->was_runnable) {
        c->least = c->goes_on ? MIN(c->least, s->time) : s->time;
        c->goes_on = true;
    }
    if (s->decodes && s->decoded) {
        c->least_decoding = c->decodes_on ? MIN(c->least_decoding, s->time) : s->time;
        c->decodes_on = true;
    }
}

static double credit(uint64_t now, uint64_t last)
{
    return last > 0 && now - last <= SHORT_ABSENCE ? ABSENCE_CREDIT : 0;
}

static void lift(struct share *s, const struct company *c, uint64_t now)
{
    if (s->is_runnable && !s->was_runnable) {
        double from = c->goes_on ? c->least : c->most;

        s->time = MAX(s->time, from - credit(now, s->runnable_at));
    }
    if (s->decodes && !s->decoded && c->decodes_on)
        s->time = MAX(s->time, c->least_decoding - credit(now, s->decoded_at));
    if (s->is_runnable)
        s->runnable_at = now;
    if (s->decodes)
        s->decoded_at = now;
}

static void next_choice(struct share *s)
{
    s->was_runnable = s->is_runnable;
    s->decoded = s->decodes;
    s->is_runnable = false;
    s->decodes = false;
    s->is_interactive = false;
    s->n_decoding = 0;
}

static bool is_runnable(const struct scheduler_entry *e)
{
    return e->task->n_pending > 0 && !e->task->is_blocked;
}

/* By this lane, now. */
static bool can_be_picked(const struct scheduler_entry *e, unsigned lane)
{
    return is_runnable(e) && !e->task->is_under_way && (e->task->lanes & 1u << lane);
}

/* With one row a step, prompts must take turns with those that decode. */
static bool is_decoding(const struct scheduler *s, const struct scheduler_entry *e)
{
    return e->task->n_pending == 1 || s->max_rows == 1;
}

/* Virtual time that a token costs. */
static double account_pace(const struct account *a, unsigned lane)
{
    double weight = (double)a->weight / DEFAULT_WEIGHT;

    return (a->is_idle || a->share[lane].is_interactive ? 1 : BATCH_PART) / weight;
}

static double flow_pace(const struct account *a, const struct flow *f, unsigned lane)
{
    return a->is_idle || f->share[lane].is_interactive ? 1 : BATCH_PART;
}

/* Who can be picked, and who of them decodes. */
static void note_runnable(struct scheduler *s, const struct choice *c)
{
    for (struct account *a = s->accounts; a; a = a->next) {
        if (a->is_idle != c->is_idle)
            continue;
        next_choice(&a->share[c->lane]);
        for (struct flow *f = a->flows; f; f = f->next)
            next_choice(&f->share[c->lane]);
    }
    for (size_t i = 0; i < s->n_running; i++) {
        const struct scheduler_entry *e = s->running[i];
        struct share *a = &e->account->share[c->lane], *f = &e->flow->share[c->lane];

        if (e->account->is_idle != c->is_idle || !can_be_picked(e, c->lane))
            continue;
        a->is_runnable = f->is_runnable = true;
        if (is_decoding(s, e)) {
            a->decodes = f->decodes = true;
            a->n_decoding++;
            f->n_decoding++;
        }
        if (e->task->class == CLASS_INTERACTIVE)
            a->is_interactive = f->is_interactive = true;
    }
}

/* An account's flows: those that join, and the least virtual times. */
static void gather_flows(struct account *a, const struct choice *c, uint64_t now, bool has_others)
{
    struct share *share = &a->share[c->lane];
    struct company flows = {0};

    for (struct flow *f = a->flows; f; f = f->next)
        note_company(&flows, &f->share[c->lane]);
    share->least = a->least_decoding = HUGE_VAL;
    for (struct flow *f = a->flows; f; f = f->next) {
        struct share *fs = &f->share[c->lane];

        lift(fs, &flows, now);
        if (fs->is_runnable)
            share->least = MIN(share->least, fs->time);
        if (fs->decodes)
            a->least_decoding =
                MIN(a->least_decoding, fs->time + fs->n_decoding * flow_pace(a, f, c->lane));
        else if (fs->is_runnable && has_others)
            a->least_decoding = MIN(a->least_decoding, fs->time);
    }
}

/*
 * Who is runnable, who decodes, and who of them joins; and what the choice is measured by: the
 * least virtual time, and what will be the least of those that decode, so that what all can have is
 * no lead.
 */
static void gather(struct scheduler *s, struct choice *c)
{
    struct lane_state *l = &s->lanes[c->lane];
    uint64_t now = l->n_steps + 1;
    struct company company = {.most = l->most[c->is_idle]};
    uint32_t n_accounts = 0;

    c->least = c->least_decoding = HUGE_VAL;
    note_runnable(s, c);
    for (struct account *a = s->accounts; a; a = a->next)
        if (a->is_idle == c->is_idle) {
            note_company(&company, &a->share[c->lane]);
            n_accounts += a->share[c->lane].is_runnable;
        }
    for (struct account *a = s->accounts; a; a = a->next) {
        struct share *share = &a->share[c->lane];

        if (a->is_idle != c->is_idle || !share->is_runnable)
            continue;
        lift(share, &company, now);
        c->least = MIN(c->least, share->time);
        if (share->decodes)
            c->least_decoding =
                MIN(c->least_decoding, share->time + share->n_decoding * account_pace(a, c->lane));
        gather_flows(a, c, now, n_accounts > 1);
    }
    l->most[c->is_idle] = company.most;
    if (c->least < HUGE_VAL)
        l->floor[c->is_idle] = c->least;
}

/* Keeps those of e[n], tasks that decode, that do not lead; the least virtual time first. */
static size_t keep_decoding(const struct choice *c, struct scheduler_entry **e, size_t n)
{
    const struct account *account = NULL;
    const struct flow *flow = NULL;
    double time = 0, flow_time = 0;
    size_t n_kept = 0;

    for (size_t i = 0; i < n; i++)
        e[i]->flow_time = e[i]->flow->share[c->lane].time;
    sort(e, n, before_in_account);
    for (size_t i = 0; i < n; i++) {
        if (e[i]->account != account)
            time = e[i]->account->share[c->lane].time;
        if (e[i]->flow != flow)
            flow_time = e[i]->flow_time;
        account = e[i]->account;
        flow = e[i]->flow;
        if (time - c->least_decoding > LEAD || flow_time - account->least_decoding > LEAD)
            continue;
        e[i]->key = time;
        time += account_pace(account, c->lane);
        flow_time += flow_pace(account, flow, c->lane);
        e[n_kept++] = e[i];
    }
    sort(e, n_kept, before_by_key);
    return n_kept;
}

static size_t keep_prompts(const struct choice *c, struct scheduler_entry **e, size_t n)
{
    size_t n_kept = 0;

    for (size_t i = 0; i < n; i++) {
        const struct share *a = &e[i]->account->share[c->lane];

        e[i]->flow_time = e[i]->flow->share[c->lane].time;
        if (a->time - c->least > LEAD || e[i]->flow_time - a->least > LEAD)
            continue;
        e[i]->key = a->time;
        e[n_kept++] = e[i];
    }
    sort(e, n_kept, before_by_key);
    return n_kept;
}

/* What a token costs alone, as well as that is known. */
static double token_usec(const struct lane_state *l)
{
    for (size_t i = 1; i < MEASURED; i++)
        if (l->measured[i].usec > 0)
            return l->measured[i].usec;
    return 0;
}

/* How many rows of prompts fit a step beside n_decoding others. */
static uint32_t rows_for(const struct scheduler *s, const struct lane_state *l,
                         enum situation situation, size_t n_decoding)
{
    double step = l->measured[MIN(n_decoding, (size_t)MEASURED - 1)].usec;
    double limit = BESIDE_FACTOR * (n_decoding > 0 ? step : token_usec(l));
    double cost = prompt_row_usec(l, situation), n = l->cost[situation].most_rows;

    if (s->is_loading)
        return l->max_rows;
    if (situation == ALONE)
        limit = MAX(limit, STEP_USEC);
    if (cost == 0)
        cost = PROMPT_COST * token_usec(l);
    if (cost > 0)
        n = MIN(n, (limit - step) / cost);
    return (uint32_t)MAX(MIN(n, (double)l->max_rows), 1.0);
}

/* Of a step of n rows or fewer. */
static uint32_t even(uint32_t n)
{
    return n >= 32 ? n / 16 * 16 : n >= 8 ? n / 4 * 4 : n;
}

static size_t choose_prompts(struct scheduler *s, unsigned lane, struct scheduler_entry **e,
                             size_t n, struct scheduler_pick *picks, size_t n_picks,
                             size_t max_picks, uint32_t n_logits)
{
    const struct account *waiting = NULL; /* one whose interactive tasks decode */
    uint32_t n_decoding = (uint32_t)n_picks, n_prompt_rows = 0;
    struct lane_state *l = &s->lanes[lane];
    bool several_wait = false;

    for (size_t i = 0; i < s->n_running; i++) {
        const struct scheduler_entry *r = s->running[i];

        if (!can_be_picked(r, lane) || !is_decoding(s, r) || r->task->class != CLASS_INTERACTIVE)
            continue;
        several_wait = several_wait || (waiting && waiting != r->account);
        waiting = r->account;
    }
    l->situation = ALONE;
    for (size_t i = 0; i < n && n_picks < max_picks; i++) {
        bool beside =
            l->situation == BESIDE || several_wait || (waiting && waiting != e[i]->account);
        uint32_t most = rows_for(s, l, beside ? BESIDE : ALONE, n_decoding), rows;

        most = MIN(most, l->max_rows - n_decoding);
        if (s->even_lanes & 1u << lane)
            most = MAX(even(n_decoding + most), n_decoding + 1) - n_decoding;
        if (most <= n_prompt_rows)
            continue;
        rows = MIN(most - n_prompt_rows, e[i]->task->n_pending);
        if (rows == e[i]->task->n_pending && n_logits == 0)
            rows--;
        else if (rows == e[i]->task->n_pending)
            n_logits--;
        if (rows == 0)
            continue;
        if (beside)
            l->situation = BESIDE;
        e[i]->was_decoding = false;
        picks[n_picks++] = (struct scheduler_pick){e[i]->task, rows};
        n_prompt_rows += rows;
    }
    return n_picks;
}

size_t scheduler_choose(struct scheduler *s, unsigned lane, struct scheduler_pick *picks,
                        size_t max_picks)
{
    struct choice c = {.lane = lane, .is_idle = true};
    struct lane_state *l = &s->lanes[lane];
    struct scheduler_entry **prompts;
    size_t n_decoding = 0, n_prompts = 0, n_picks, n_rows;
    const struct measured *m;

    assert(lane < SCHEDULER_LANES);
    for (size_t i = 0; i < s->n_running && c.is_idle; i++)
        c.is_idle = s->running[i]->account->is_idle || !is_runnable(s->running[i]);
    gather(s, &c);
    if (s->n_running == 0)
        return 0;

    /* Those that decode from the front, prompts from the back. */
    prompts = s->sorted + s->n_allocated;
    for (size_t i = 0; i < s->n_running; i++) {
        struct scheduler_entry *e = s->running[i];

        if (e->account->is_idle != c.is_idle || !can_be_picked(e, lane))
            continue;
        if (is_decoding(s, e)) {
            s->sorted[n_decoding++] = e;
        } else {
            *--prompts = e;
            n_prompts++;
        }
    }
    l->n_decoding = (uint32_t)n_decoding;
    n_decoding = keep_decoding(&c, s->sorted, n_decoding);
    n_prompts = keep_prompts(&c, prompts, n_prompts);

    n_rows = n_prompts > 0 && l->max_rows > 1 ? l->max_rows - 1 : l->max_rows;
    n_picks = MIN(MIN(n_decoding, (size_t)s->max_logits), MIN(n_rows, max_picks));
    for (size_t i = 0; i < n_picks; i++) {
        struct scheduler_entry *e = s->sorted[i];

        e->was_decoding = true;
        picks[i] = (struct scheduler_pick){e->task, 1};
    }
    m = &l->measured[MIN(n_picks, (size_t)MEASURED - 1)];
    if (n_picks > 0 && !s->is_loading && (m->usec == 0 || l->n_steps - m->at > MEASURE_AGAIN))
        return n_picks;
    return choose_prompts(s, lane, prompts, n_prompts, picks, n_picks, max_picks,
                          s->max_logits - (uint32_t)n_picks);
}

/* ---- what it took ---- */

/* Steps without prompts. Goes down fast and up slowly: a step disturbed from outside says little.
 */
static void learn_decoding(struct lane_state *l, size_t n, double usec)
{
    struct measured *m = &l->measured[MIN(n, (size_t)MEASURED - 1)];

    if (m->usec == 0)
        m->usec = usec;
    else if (usec < m->usec)
        m->usec += 0.5 * (usec - m->usec);
    else
        m->usec += 0.1 * (MIN(usec, 3 * m->usec) - m->usec);
    m->usec = MAX(m->usec, 1.0);
    m->at = l->n_steps;
}

static void learn_prompts(struct lane_state *l, size_t n_decoding, uint32_t rows, double usec)
{
    struct prompt_cost *c = &l->cost[l->situation];
    double step = n_decoding > 0 ? l->measured[MIN(n_decoding, (size_t)MEASURED - 1)].usec : 0;
    double extra = MAX(usec - step, 0.0);
    double growth = l->situation == BESIDE ? 1.25 : 2;

    /* What others on the machine take away does not become less with smaller chunks. */
    if (c->rows > 0)
        extra = MIN(extra, MAX(2 * rows * c->usec / c->rows, step));
    c->usec = 0.5 * c->usec + extra;
    c->rows = 0.5 * c->rows + rows;
    c->most_rows = MAX(0.9 * c->most_rows, growth * rows + 1);
    c->most_rows = MIN(c->most_rows, (double)l->max_rows);
}

static void note_rate(struct lane_state *l, uint64_t usec, uint32_t prompt_rows, uint32_t decoded)
{
    struct rate_slot *slot = &l->slots[l->slot];

    slot->usec += usec;
    slot->prompt_rows += prompt_rows;
    slot->decoded += decoded;
    if (slot->usec >= RATE_SLOT_USEC) {
        l->slot = (l->slot + 1) % RATE_SLOTS;
        l->slots[l->slot] = (struct rate_slot){0};
    }
}

/* for_prompts: rows of prompts, with those that were picked as if they decoded. */
static void learn(struct lane_state *l, size_t n_decoding, uint32_t prompt_rows,
                  uint32_t for_prompts, uint64_t took_usec)
{
    if (prompt_rows > 0)
        learn_prompts(l, n_decoding, prompt_rows, (double)took_usec);
    else
        learn_decoding(l, n_decoding, (double)took_usec);
    if (n_decoding > 0) {
        double usec = (double)took_usec * MAX(l->n_decoding, 1u) / (double)n_decoding;

        l->token_usec += l->token_usec > 0 ? 0.1 * (usec - l->token_usec) : usec;
    }
    note_rate(l, took_usec, for_prompts, (uint32_t)n_decoding + prompt_rows - for_prompts);
}

/* What a row of a prompt costs in tokens. */
static double prompt_price(const struct lane_state *l)
{
    double token = token_usec(l);

    return token > 0 ? MIN(MAX(prompt_row_usec(l, l->situation) / token, 0.01), 1.0) : PROMPT_COST;
}

static void charge(struct scheduler *s, unsigned lane, const struct scheduler_pick *pick,
                   double price)
{
    struct scheduler_entry *e = pick->task->entry;
    struct account *a = e->account;
    double work = pick->n_rows * (e->was_decoding ? 1 : price), *most;

    most = &s->lanes[lane].most[a->is_idle];
    a->share[lane].time += work * account_pace(a, lane);
    e->flow->share[lane].time += work * flow_pace(a, e->flow, lane);
    *most = MAX(*most, a->share[lane].time);
    if (e->was_decoding && !e->task->is_prompt)
        e->n_decoded += pick->n_rows;
}

void scheduler_account(struct scheduler *s, unsigned lane, const struct scheduler_pick *picks,
                       size_t n_picks, uint64_t took_usec)
{
    struct lane_state *l = &s->lanes[lane];
    uint32_t prompt_rows = 0, for_prompts = 0;
    size_t n_decoding = 0;
    double price;

    assert(lane < SCHEDULER_LANES);
    for (size_t i = 0; i < n_picks; i++) {
        if (picks[i].n_rows == 0)
            continue;
        if (picks[i].task->entry->was_decoding)
            n_decoding++;
        else
            prompt_rows += picks[i].n_rows;
        if (picks[i].task->is_prompt || !picks[i].task->entry->was_decoding)
            for_prompts += picks[i].n_rows;
    }
    if (n_decoding + prompt_rows == 0)
        return;
    l->n_steps++;
    l->statistics.prompt_rows += for_prompts;
    l->statistics.decoded_rows += n_decoding + prompt_rows - for_prompts;
    l->statistics.usec += took_usec;
    s->is_ranked = false;
    if (!s->is_loading)
        learn(l, n_decoding, prompt_rows, for_prompts, took_usec);
    price = prompt_price(l);
    for (size_t i = 0; i < n_picks; i++)
        charge(s, lane, &picks[i], price);
}

static void get_lane(const struct lane_state *l, struct lane_statistics *ret)
{
    struct rate_slot sum = {0};

    *ret = l->statistics;
    ret->passes = l->n_steps;
    for (size_t i = 0; i < RATE_SLOTS; i++) {
        sum.usec += l->slots[i].usec;
        sum.prompt_rows += l->slots[i].prompt_rows;
        sum.decoded += l->slots[i].decoded;
    }
    if (sum.usec > 0) {
        ret->prefill_rate = (double)sum.prompt_rows * 1e6 / (double)sum.usec;
        ret->decode_rate = (double)sum.decoded * 1e6 / (double)sum.usec;
    }
}

void scheduler_get_statistics(const struct scheduler *s, struct scheduler_statistics *ret)
{
    *ret = (struct scheduler_statistics){.n_queued = (uint32_t)s->n_queued,
                                         .n_running = (uint32_t)s->n_running};
    for (unsigned l = 0; l < SCHEDULER_LANES; l++) {
        get_lane(&s->lanes[l], &ret->lanes[l]);
        ret->n_steps += ret->lanes[l].passes;
        ret->prefill_rate += ret->lanes[l].prefill_rate;
        ret->decode_rate += ret->lanes[l].decode_rate;
    }
}
