//! Days and hours as the clock's registers hold them.

/// Register B: registers are binary and not BCD.
pub(super) const B_BINARY: u8 = 1 << 2;
/// Register B: hours count to 24 and not to 12.
pub(super) const B_24_HOURS: u8 = 1 << 1;
/// In a register of hours that count to 12: afternoon.
const PM: u8 = 1 << 7;

/// Seconds, minutes, hours, day of the week (Sunday is 1), day, month, year of the century; and the century.
pub(super) struct Registers {
    pub(super) fields: [u8; 7],
    pub(super) century: u8,
}

/// The registers for a time in seconds since 1970.
pub(super) fn registers_of(seconds: i64, b: u8) -> Registers {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = date(days);
    let hour = second / 3600;
    let shown = |value: i64| if b & B_BINARY != 0 { value as u8 } else { (value / 10 * 16 + value % 10) as u8 };
    let hours = match b & B_24_HOURS {
        0 => shown((hour + 11) % 12 + 1) | if hour >= 12 { PM } else { 0 },
        _ => shown(hour),
    };
    // 1 January 1970 was a Thursday.
    let weekday = (days + 4).rem_euclid(7) + 1;
    let fields = [
        shown(second % 60),
        shown(second / 60 % 60),
        hours,
        shown(weekday),
        shown(day),
        shown(month),
        shown(year.rem_euclid(100)),
    ];
    Registers { fields, century: shown(year.div_euclid(100)) }
}

/// The time of registers. Values that are no time are taken modulo what they can be.
pub(super) fn seconds_from(registers: &Registers, b: u8) -> i64 {
    let value = |register: u8| match b & B_BINARY {
        0 => i64::from(register >> 4) * 10 + i64::from(register & 0xf),
        _ => register.into(),
    };
    let [second, minute, hour, _, day, month, year] = registers.fields;
    let hour = match b & B_24_HOURS {
        0 => value(hour & !PM) % 12 + if hour & PM != 0 { 12 } else { 0 },
        _ => value(hour) % 24,
    };
    let year = value(registers.century) * 100 + value(year) % 100;
    let days = days_until(year, (value(month) - 1).rem_euclid(12) + 1, value(day).max(1));
    days * 86_400 + hour * 3600 + value(minute) % 60 * 60 + value(second) % 60
}

const DAYS_OF_400_YEARS: i64 = 146_097;
/// From 1 March of the year 0 to 1 January 1970.
const EPOCH: i64 = 719_468;

/// Year, month and day of a day since 1970, in the Gregorian calendar. Years are counted from March, so that the leap
/// day is the last of its year.
fn date(days: i64) -> (i64, i64, i64) {
    let shifted = days + EPOCH;
    let (era, of_era) = (shifted.div_euclid(DAYS_OF_400_YEARS), shifted.rem_euclid(DAYS_OF_400_YEARS));
    let year = (0..400).rev().find(|year| first_of(*year) <= of_era).unwrap_or(0);
    let of_year = of_era - first_of(year);
    let month = (0..12).rev().find(|month| month_begins(*month) <= of_year).unwrap_or(0);
    let (calendar_month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + carry, calendar_month, of_year - month_begins(month) + 1)
}

fn days_until(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    era * DAYS_OF_400_YEARS + first_of(of_era) + month_begins(month) + day - 1 - EPOCH
}

/// Days from the beginning of 400 years to that of one of them, March to March.
fn first_of(year: i64) -> i64 {
    year * 365 + year / 4 - year / 100
}

/// Days from 1 March to the first day of a month, which is counted from March.
fn month_begins(month: i64) -> i64 {
    const LENGTHS: [i64; 11] = [31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31];
    LENGTHS[..month as usize].iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days() {
        // date -u -d @SECONDS
        for (seconds, fields) in [
            (0, [0x00, 0x00, 0x00, 0x05, 0x01, 0x01, 0x70]),
            (951_827_696, [0x56, 0x34, 0x12, 0x03, 0x29, 0x02, 0x00]),
            (1_795_305_594, [0x54, 0x59, 0x23, 0x07, 0x21, 0x11, 0x26]),
        ] {
            assert_eq!(registers_of(seconds, B_24_HOURS).fields, fields, "{seconds}");
        }
        assert_eq!(registers_of(951_827_696, 0).fields[2], 0x12 | PM);
        assert_eq!(registers_of(0, B_BINARY).fields[2], 12);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn a_time_that_is_shown_is_read_back(seconds in 0i64..8_000_000_000, b in any::<u8>()) {
            prop_assert_eq!(seconds_from(&registers_of(seconds, b), b), seconds);
        }

        #[test]
        fn any_registers_are_some_time(fields in any::<[u8; 7]>(), century: u8, b: u8) {
            seconds_from(&Registers { fields, century }, b);
        }
    }
}
