/* SPDX-License-Identifier: GPL-2.0-only */
/* A mediated device for tests of live migration, written from the documentation of VFIO's user interface. */
#ifndef TESTDEV_H
#define TESTDEV_H

#include <linux/atomic.h>
#include <linux/device.h>
#include <linux/eventfd.h>
#include <linux/mdev.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/vfio.h>

#define TD_VENDOR 0x7e57
#define TD_DEVICE 0x0001
#define TD_BAR_SIZE 0x1000
#define TD_VECTORS 4
/* Where a region starts in the device's file. */
#define TD_REGION_SHIFT 40
#define TD_REGION(index) ((u64)(index) << TD_REGION_SHIFT)
/* What MIG_DATA_SIZE and PRECOPY_INFO answer is the truth, and not a number that was set. */
#define TD_TRUE U64_MAX

/* Registers of BAR 0, 32 bits each. */
enum td_register {
	TD_REG_ID = 0x00,	 /* "tdev", read only */
	TD_REG_COUNTER = 0x04,	 /* keeps what is written */
	TD_REG_SCRATCH = 0x08,	 /* likewise */
	TD_REG_RAISE = 0x0c,	 /* written: raises interrupt vector n (with INTx: sets bit n of PENDING) */
	TD_REG_PENDING = 0x10,	 /* bits of INTx; a bit that is written as one is cleared */
	TD_REG_RAISED = 0x14,	 /* interrupts raised, read only */
	TD_REG_DMA_LOW = 0x18,	 /* first address that is written to */
	TD_REG_DMA_HIGH = 0x1c,
	TD_REG_DMA_PAGES = 0x20, /* number of pages, 0: no DMA */
	TD_REG_DMA_DONE = 0x24,	 /* low half of the number of pages written so far, read only */
};
#define TD_ID 0x76656474

/* Counters, in the order of td_counter_names. */
enum td_counter {
	TD_C_ARCS,
	TD_C_DATA_SIZE,
	TD_C_PRECOPY_INFO,
	TD_C_REINITS,
	TD_C_READS,
	TD_C_READ_BYTES,
	TD_C_SAVES,
	TD_C_WRITES,
	TD_C_WRITTEN_BYTES,
	TD_C_LOADS,
	TD_C_LOAD_ERRORS,
	TD_C_STATE_GOOD,
	TD_C_STATE_BAD,
	TD_C_LOG_STARTS,
	TD_C_LOG_REPORTS,
	TD_C_LOG_PAGES,
	TD_C_DMA_WRITES,
	TD_C_DMA_ERRORS,
	TD_C_CHECKS_GOOD,
	TD_C_CHECKS_BAD,
	TD_C_PAGES_BAD,
	TD_C_RAISED,
	TD_C_SIGNALLED,
	TD_C_RESETS,
	TD_C_MEMORY_ACCESSES,
	TD_C_COUNT,
};

/* What can be told to fail, apart from the arcs. */
enum td_call {
	TD_CALL_READ,
	TD_CALL_WRITE,
	TD_CALL_DATA_SIZE,
	TD_CALL_PRECOPY_INFO,
	TD_CALL_LOG_START,
	TD_CALL_LOG_REPORT,
	TD_CALL_LOG_STOP,
	TD_CALL_COUNT,
};

/* Lets `after` calls pass, and the next `times` fail with `error`. */
struct td_fault {
	u32 error;
	u32 times;
	u32 after;
};

/* Set in sysfs, per device. */
struct td_parameters {
	u32 migration_flags;
	u64 initial_size;
	u64 dirty_size;
	u64 dirty_rounds;
	u64 final_size;
	u64 reinits;
	u64 drain_enomsg;
	u64 endless;
	u64 data_size;
	u64 data_size_ms;
	u64 initial_bytes;
	u64 dirty_bytes;
	u64 load_initial_ms;
	u64 load_final_ms;
	u64 dma_iova;
	u64 dma_pages;
	u64 dma_burst;
	u64 dma_interval_us;
	u64 dma_needs_bus_master;
	u64 log;
	u64 log_offered;
	u64 reset_offered;
	u64 error_after_fault;
	u64 interrupts;
};

/* The device's own state, as it travels. */
struct td_state {
	u32 counter;
	u32 scratch;
	u32 pending;
	u32 raised;
	u64 dma_base;
	u64 dma_pages;
	u64 dma_done;
	u8 page[TD_BAR_SIZE];
};

struct td_session;

struct testdev {
	struct vfio_device vdev;
	struct mdev_device *mdev;
	struct td_parameters parameters;
	struct td_fault faults[TD_CALL_COUNT];
	struct td_fault arcs[VFIO_DEVICE_STATE_PRE_COPY_P2P + 1][VFIO_DEVICE_STATE_PRE_COPY_P2P + 1];
	atomic64_t counters[TD_C_COUNT];
	bool open;

	/* Taken before session->lock and before irq_lock. */
	struct mutex lock;
	enum vfio_device_mig_state migration;
	struct td_session *session;
	bool precopy_info_v2;
	struct td_state state;
	struct page *shared; /* BAR 1, which the monitor may map */
	u8 config[256];
	u8 writable[256];

	spinlock_t irq_lock;
	bool masked;
	struct eventfd_ctx *intx;
	struct virqfd *unmask;
	struct eventfd_ctx *msi[TD_VECTORS];
	u32 msi_late; /* raised while the device was not running */
	int msi_index; /* VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, or -1 */

	struct task_struct *dma;
	bool check;
	unsigned long *log_bits;
	u64 log_base;
	u64 log_count;
	bool log_all;
};

static inline void td_count(struct testdev *td, enum td_counter which)
{
	atomic64_inc(&td->counters[which]);
}

static inline void td_add(struct testdev *td, enum td_counter which, u64 more)
{
	atomic64_add(more, &td->counters[which]);
}

/* 0, or a negative error that the call is to fail with. */
int td_fault(struct td_fault *fault);

static inline bool td_running(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_RUNNING || state == VFIO_DEVICE_STATE_RUNNING_P2P ||
	       state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

/* sysfs.c */
extern const struct attribute_group *td_groups[];
extern const char *const td_state_names[];
void td_defaults(struct td_parameters *parameters);

/* pci.c */
void td_pci_init(struct testdev *td);
void td_power_on(struct testdev *td);
bool td_bus_master(struct testdev *td);
bool td_intx_disabled(struct testdev *td);
ssize_t td_region_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos);
ssize_t td_region_write(struct vfio_device *vdev, const char __user *buf, size_t count, loff_t *ppos);
int td_region_mmap(struct vfio_device *vdev, struct vm_area_struct *vma);
long td_region_info(struct testdev *td, unsigned long arg);

/* irq.c */
void td_irq_init(struct testdev *td);
void td_irq_close(struct testdev *td);
void td_irq_update(struct testdev *td);
void td_irq_raise(struct testdev *td, u32 vector);
long td_irq_info(struct testdev *td, unsigned long arg);
long td_set_irqs(struct testdev *td, unsigned long arg);

/* migration.c */
extern const struct vfio_migration_ops td_migration_ops;
void td_migration_reset(struct testdev *td);
int td_device_feature(struct vfio_device *vdev, u32 flags, void __user *arg, size_t argsz);

/* dma.c */
extern const struct vfio_log_ops td_log_ops;
int td_dma_start(struct testdev *td);
void td_dma_stop(struct testdev *td);

#endif
