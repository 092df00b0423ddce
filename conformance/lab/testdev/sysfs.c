// SPDX-License-Identifier: GPL-2.0-only
/*
 * Parameters, faults and counters in the folder "testdev" of each device. Numbers are decimal or 0x…. Some are fixed while the
 * device is in use (EBUSY); all others hold from the next call on.
 */
#include <linux/sysfs.h>

#include "testdev.h"

const char *const td_state_names[] = {
	[VFIO_DEVICE_STATE_ERROR] = "ERROR",
	[VFIO_DEVICE_STATE_STOP] = "STOP",
	[VFIO_DEVICE_STATE_RUNNING] = "RUNNING",
	[VFIO_DEVICE_STATE_STOP_COPY] = "STOP_COPY",
	[VFIO_DEVICE_STATE_RESUMING] = "RESUMING",
	[VFIO_DEVICE_STATE_RUNNING_P2P] = "RUNNING_P2P",
	[VFIO_DEVICE_STATE_PRE_COPY] = "PRE_COPY",
	[VFIO_DEVICE_STATE_PRE_COPY_P2P] = "PRE_COPY_P2P",
};

static const char *const counter_names[TD_C_COUNT] = {
	[TD_C_ARCS] = "arcs",
	[TD_C_DATA_SIZE] = "data_size",
	[TD_C_PRECOPY_INFO] = "precopy_info",
	[TD_C_REINITS] = "reinits",
	[TD_C_READS] = "reads",
	[TD_C_READ_BYTES] = "read_bytes",
	[TD_C_SAVES] = "saves",
	[TD_C_WRITES] = "writes",
	[TD_C_WRITTEN_BYTES] = "written_bytes",
	[TD_C_LOADS] = "loads",
	[TD_C_LOAD_ERRORS] = "load_errors",
	[TD_C_STATE_GOOD] = "state_good",
	[TD_C_STATE_BAD] = "state_bad",
	[TD_C_LOG_STARTS] = "log_starts",
	[TD_C_LOG_REPORTS] = "log_reports",
	[TD_C_LOG_PAGES] = "log_pages",
	[TD_C_DMA_WRITES] = "dma_writes",
	[TD_C_DMA_ERRORS] = "dma_errors",
	[TD_C_CHECKS_GOOD] = "checks_good",
	[TD_C_CHECKS_BAD] = "checks_bad",
	[TD_C_PAGES_BAD] = "pages_bad",
	[TD_C_RAISED] = "raised",
	[TD_C_SIGNALLED] = "signalled",
	[TD_C_RESETS] = "resets",
	[TD_C_MEMORY_ACCESSES] = "memory_accesses",
};

static const char *const call_names[TD_CALL_COUNT] = {
	[TD_CALL_READ] = "read",
	[TD_CALL_WRITE] = "write",
	[TD_CALL_DATA_SIZE] = "data_size",
	[TD_CALL_PRECOPY_INFO] = "precopy_info",
	[TD_CALL_LOG_START] = "log_start",
	[TD_CALL_LOG_REPORT] = "log_report",
	[TD_CALL_LOG_STOP] = "log_stop",
};

void td_defaults(struct td_parameters *parameters)
{
	*parameters = (struct td_parameters){
		.migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY,
		.initial_size = 64 << 10,
		.dirty_size = 32 << 10,
		.dirty_rounds = 3,
		.final_size = 256 << 10,
		.drain_enomsg = 1,
		.data_size = TD_TRUE,
		.initial_bytes = TD_TRUE,
		.dirty_bytes = TD_TRUE,
		.dma_burst = 4,
		.dma_interval_us = 2000,
		.dma_needs_bus_master = 1,
		.log = 1,
		.log_offered = 1,
		.reset_offered = 1,
		.interrupts = 7,
	};
}

struct td_attribute {
	struct device_attribute attribute;
	size_t offset;
	u64 limit;
	bool fixed; /* while the device is open */
	bool truth; /* "true" instead of a number */
};

static u64 *value_of(struct device *dev, struct device_attribute *attribute, struct td_attribute **found)
{
	struct testdev *td = dev_get_drvdata(dev);

	*found = container_of(attribute, struct td_attribute, attribute);
	return (u64 *)((u8 *)&td->parameters + (*found)->offset);
}

static ssize_t show(struct device *dev, struct device_attribute *attribute, char *buf)
{
	struct td_attribute *found;
	u64 *value = value_of(dev, attribute, &found);

	if (found->truth && *value == TD_TRUE)
		return sysfs_emit(buf, "true\n");
	return sysfs_emit(buf, "%llu\n", *value);
}

static ssize_t store(struct device *dev, struct device_attribute *attribute, const char *buf, size_t count)
{
	struct testdev *td = dev_get_drvdata(dev);
	struct td_attribute *found;
	u64 *value = value_of(dev, attribute, &found), fresh;
	int error = 0;

	if (found->truth && sysfs_streq(buf, "true"))
		fresh = TD_TRUE;
	else
		error = kstrtou64(buf, 0, &fresh);
	if (error)
		return error;
	if (fresh > found->limit)
		return -ERANGE;
	mutex_lock(&td->lock);
	if (found->fixed && td->open) {
		error = -EBUSY;
	} else {
		*value = fresh;
		td->vdev.log_ops = td->parameters.log_offered ? &td_log_ops : NULL;
	}
	mutex_unlock(&td->lock);
	return error ? error : count;
}

#define PARAMETER(name_, limit_, fixed_, truth_)                                        \
	static struct td_attribute attribute_##name_ = {                                \
		.attribute = __ATTR(name_, 0644, show, store),                          \
		.offset = offsetof(struct td_parameters, name_),                        \
		.limit = limit_, .fixed = fixed_, .truth = truth_,                      \
	}
#define SIZE (1ULL << 40)
#define SECONDS 100000

PARAMETER(initial_size, SIZE, false, false);
PARAMETER(dirty_size, SIZE, false, false);
PARAMETER(dirty_rounds, U64_MAX, false, false);
PARAMETER(final_size, SIZE, false, false);
PARAMETER(reinits, U64_MAX, false, false);
PARAMETER(drain_enomsg, 1, false, false);
PARAMETER(endless, 1, false, false);
PARAMETER(data_size, U64_MAX, false, true);
PARAMETER(data_size_ms, SECONDS, false, false);
PARAMETER(initial_bytes, U64_MAX, false, true);
PARAMETER(dirty_bytes, U64_MAX, false, true);
PARAMETER(load_initial_ms, SECONDS, false, false);
PARAMETER(load_final_ms, SECONDS, false, false);
PARAMETER(dma_iova, U64_MAX & PAGE_MASK, true, false);
PARAMETER(dma_pages, U32_MAX, true, false);
PARAMETER(dma_burst, 4096, false, false);
PARAMETER(dma_interval_us, 10000000, false, false);
PARAMETER(dma_needs_bus_master, 1, false, false);
PARAMETER(log, 1, false, false);
PARAMETER(log_offered, 1, true, false);
PARAMETER(reset_offered, 1, true, false);
PARAMETER(error_after_fault, 1, false, false);
PARAMETER(interrupts, 7, true, false);

/* 0: no migration at all. */
static ssize_t migration_flags_show(struct device *dev, struct device_attribute *attribute, char *buf)
{
	struct testdev *td = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%u\n", td->parameters.migration_flags);
}

static ssize_t migration_flags_store(struct device *dev, struct device_attribute *attribute, const char *buf, size_t count)
{
	struct testdev *td = dev_get_drvdata(dev);
	u32 flags;
	int error = kstrtou32(buf, 0, &flags);

	if (error)
		return error;
	/* The interface knows no device with other states and without STOP_COPY. */
	if (flags > 7 || (flags && !(flags & VFIO_MIGRATION_STOP_COPY)))
		return -EINVAL;
	mutex_lock(&td->lock);
	if (td->open) {
		error = -EBUSY;
	} else {
		td->parameters.migration_flags = flags;
		td->vdev.migration_flags = flags;
		td->vdev.mig_ops = flags ? &td_migration_ops : NULL;
	}
	mutex_unlock(&td->lock);
	return error ? error : count;
}
static DEVICE_ATTR_RW(migration_flags);

static int state_of(const char *name)
{
	for (int i = 0; i < ARRAY_SIZE(td_state_names); i++)
		if (!strcmp(name, td_state_names[i]))
			return i;
	return -EINVAL;
}

/* "CALL ERRNO [TIMES [AFTER]]" or "FROM TO ERRNO [TIMES [AFTER]]"; TIMES is 1 and AFTER 0 where they are left out. */
static ssize_t fail_store(struct device *dev, struct device_attribute *attribute, const char *buf, size_t count)
{
	struct testdev *td = dev_get_drvdata(dev);
	struct td_fault fault = { .times = 1 }, *where = NULL;
	char first[16], second[16];

	if (sscanf(buf, "%15s %u %u %u", first, &fault.error, &fault.times, &fault.after) >= 2) {
		for (int i = 0; i < TD_CALL_COUNT; i++)
			if (!strcmp(first, call_names[i]))
				where = &td->faults[i];
	} else if (sscanf(buf, "%15s %15s %u %u %u", first, second, &fault.error, &fault.times, &fault.after) >= 3) {
		int from = state_of(first), to = state_of(second);

		if (from >= 0 && to >= 0)
			where = &td->arcs[from][to];
	}
	if (!where || !fault.error || fault.error > 4095)
		return -EINVAL;
	mutex_lock(&td->lock);
	*where = fault;
	mutex_unlock(&td->lock);
	return count;
}
static DEVICE_ATTR_WO(fail);

static ssize_t counters_show(struct device *dev, struct device_attribute *attribute, char *buf)
{
	struct testdev *td = dev_get_drvdata(dev);
	int at = 0;

	for (int i = 0; i < TD_C_COUNT; i++)
		at += sysfs_emit_at(buf, at, "%s %lld\n", counter_names[i], atomic64_read(&td->counters[i]));
	return at;
}

/* Anything that is written sets them to 0. */
static ssize_t counters_store(struct device *dev, struct device_attribute *attribute, const char *buf, size_t count)
{
	struct testdev *td = dev_get_drvdata(dev);

	for (int i = 0; i < TD_C_COUNT; i++)
		atomic64_set(&td->counters[i], 0);
	return count;
}
static DEVICE_ATTR_RW(counters);

static ssize_t state_show(struct device *dev, struct device_attribute *attribute, char *buf)
{
	struct testdev *td = dev_get_drvdata(dev);
	ssize_t length;

	mutex_lock(&td->lock);
	length = sysfs_emit(buf, "%s\n", td->open ? td_state_names[td->migration] : "closed");
	mutex_unlock(&td->lock);
	return length;
}
static DEVICE_ATTR_RO(state);

static ssize_t raise_store(struct device *dev, struct device_attribute *attribute, const char *buf, size_t count)
{
	struct testdev *td = dev_get_drvdata(dev);
	u32 vector;
	int error = kstrtou32(buf, 0, &vector);

	if (error)
		return error;
	if (vector >= TD_VECTORS)
		return -ERANGE;
	mutex_lock(&td->lock);
	td_irq_raise(td, vector);
	mutex_unlock(&td->lock);
	return count;
}
static DEVICE_ATTR_WO(raise);

static struct attribute *attributes[] = {
	&dev_attr_migration_flags.attr,
	&attribute_initial_size.attribute.attr,
	&attribute_dirty_size.attribute.attr,
	&attribute_dirty_rounds.attribute.attr,
	&attribute_final_size.attribute.attr,
	&attribute_reinits.attribute.attr,
	&attribute_drain_enomsg.attribute.attr,
	&attribute_endless.attribute.attr,
	&attribute_data_size.attribute.attr,
	&attribute_data_size_ms.attribute.attr,
	&attribute_initial_bytes.attribute.attr,
	&attribute_dirty_bytes.attribute.attr,
	&attribute_load_initial_ms.attribute.attr,
	&attribute_load_final_ms.attribute.attr,
	&attribute_dma_iova.attribute.attr,
	&attribute_dma_pages.attribute.attr,
	&attribute_dma_burst.attribute.attr,
	&attribute_dma_interval_us.attribute.attr,
	&attribute_dma_needs_bus_master.attribute.attr,
	&attribute_log.attribute.attr,
	&attribute_log_offered.attribute.attr,
	&attribute_reset_offered.attribute.attr,
	&attribute_error_after_fault.attribute.attr,
	&attribute_interrupts.attribute.attr,
	&dev_attr_fail.attr,
	&dev_attr_counters.attr,
	&dev_attr_state.attr,
	&dev_attr_raise.attr,
	NULL,
};

static const struct attribute_group group = { .name = "testdev", .attrs = attributes };
const struct attribute_group *td_groups[] = { &group, NULL };
