// Cutting a step of attention into tasks, running them, merging their parts.
//
// Sequences of few query rows are cut into parts of their context, so one long sequence keeps every core busy. Where the
// cuts lie depends on lengths only, never on the number of threads, hence neither does the result.
#pragma once
#include "decode.h"

struct Merge { int64_t task, parts, kv_head; };

// Merge the parts of one key-value head's rows: `parts` tasks from `first`, alike but for their keys and partials.
static void merge(const Attention& a, const Task* first, int64_t parts, int64_t kv_head, const Partials& partials) {
  const int64_t group = a.heads / a.kv_heads, rows = first->count * group, begin = a.starts[first->sequence];
  for (int64_t r = 0; r < rows; r++) {
    const int64_t head = kv_head * group + r % group, row = (kv_head - first->kv_head) * rows + r;
    float high = a.sinks ? a.sinks[head] : LOWEST;
    for (int64_t p = 0; p < parts; p++) high = std::max(high, partials.m[first[p].partial + row]);
    float total = a.sinks ? std::exp(a.sinks[head] - high) : 0.0f;
    float* to = a.out + ((begin + first->first + r / group) * a.heads + head) * a.v_dim;
    for (int64_t d = 0; d < a.v_dim; d++) to[d] = 0;
    for (int64_t p = 0; p < parts; p++) {
      const int64_t at = first[p].partial + row;
      const float part = partials.m[at] == LOWEST ? 0.0f : std::exp(partials.m[at] - high);
      const float* from = partials.o + at * a.v_dim;
      total += partials.l[at] * part;
      for (int64_t d = 0; d < a.v_dim; d++) to[d] += part * from[d];
    }
    float inverse = total > 0 ? 1.0f / total : 0.0f;
    for (int64_t d = 0; d < a.v_dim; d++) to[d] *= inverse;
  }
}

struct Plan {
  std::vector<Task> tasks;
  std::vector<Merge> merges;
  int64_t rows = 0, work = 0;

  void add(Task task, int64_t rows_per_head, int64_t parts, int64_t part) {
    if (parts == 1 && !task.few) { tasks.push_back(task); return; }
    for (int64_t h = 0; h < task.heads; h++) merges.push_back({(int64_t)tasks.size(), parts, task.kv_head + h});
    const int64_t from = task.from, to = task.to;
    for (int64_t p = 0; p < parts; p++, rows += task.heads * rows_per_head) {
      task.from = from + p * part, task.to = std::min(to, from + (p + 1) * part), task.partial = rows;
      tasks.push_back(task);
    }
  }
};

// Keys per part of a sequence with few rows: enough parts to share out, few enough to merge.
static inline int64_t part_size(int64_t keys) {
  return std::min<int64_t>(1024, std::max<int64_t>(256, round_up(keys / 32, TILE)));
}

// Returns 0, or 1: lengths or query starts are inconsistent, 2: a block table names a block that does not exist.
template <class T> static int attend(const Attention& a, int threads) {
  const int64_t group = a.heads / a.kv_heads, step = std::max<int64_t>(1, ROWS / group);
  auto first_key = [&](int64_t end, int64_t count) { return a.window ? std::max<int64_t>(0, end - count - a.window + 1) : 0; };
  auto parts_of = [](int64_t keys, int64_t part) { return std::max<int64_t>(1, (keys + part - 1) / part); };
  int64_t few_parts = 0;
  if (a.sequences && a.starts[0] != 0) return 1;
  for (int64_t n = 0; n < a.sequences; n++) {
    const int64_t queries = a.starts[n + 1] - a.starts[n], length = a.lens[n];
    if (queries < 0 || a.starts[n + 1] > a.total_rows) return 1;
    if (!queries) continue;
    if (length < queries || length > a.table_width * a.page) return 1;
    const int64_t oldest = first_key(length, queries);
    for (int64_t b = oldest / a.page; b * a.page < length; b++) {
      const int32_t block = a.tables[n * a.table_width + b];
      if (block < 0 || block >= a.blocks) return 2;
    }
    if (is_few(a, queries)) few_parts += parts_of(length - oldest, part_size(length - oldest));
  }
  Plan plan;
  // All heads of a part in one task, which reads memory in order, unless that leaves cores idle.
  const int64_t wanted = few_parts ? (2 * threads + few_parts - 1) / few_parts : 1;
  const int64_t heads = std::max<int64_t>(1, a.kv_heads / std::min(wanted, a.kv_heads));
  for (int64_t n = 0; n < a.sequences; n++) {
    const int64_t queries = a.starts[n + 1] - a.starts[n], length = a.lens[n];
    if (!queries) continue;
    const bool few = is_few(a, queries), cut = queries <= step;
    for (int64_t first = (queries - 1) / step * step; first >= 0; first -= step) {  // longest first
      const int64_t count = std::min(step, queries - first), to = length - queries + first + count;
      const int64_t from = first_key(to, count), part = few ? part_size(to - from) : 1024;
      const int64_t parts = cut ? parts_of(to - from, part) : 1, together = few ? heads : 1;
      plan.work += count * a.heads * (to - from) * (a.q_dim + a.v_dim);
      for (int64_t h = 0; h < a.kv_heads; h += together)
        plan.add({n, h, std::min(together, a.kv_heads - h), first, count, from, to, -1, few}, count * group, parts, part);
    }
  }
  std::vector<float> buffer(plan.rows * (a.v_dim + 2));
  const Partials partials{buffer.data(), buffer.data() + plan.rows, buffer.data() + 2 * plan.rows};
  const std::vector<Task>& tasks = plan.tasks;
  parallel_tasks(tasks.size(), 1, plan.work < 400000 ? 1 : threads, [&](int64_t i) {
    if (tasks[i].few) run_few_of<T>(a, tasks[i], partials);
    else run_task<T>(a, tasks[i], partials);
  });
  parallel_tasks(plan.merges.size(), 1, plan.rows * a.v_dim < 1000000 ? 1 : threads, [&](int64_t i) {
    const Merge& one = plan.merges[i];
    merge(a, &tasks[one.task], one.parts, one.kv_head, partials);
  });
  return 0;
}
